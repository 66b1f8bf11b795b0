"""The wheel alone, in an empty folder: what ``pip install`` brings is enough to start with."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables under which Python finds the wheel first, then this environment's packages, and no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(folder / "src")]
    copy = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]

    # Building writes into the folder that is built: a copy of the tracked files leaves the checkout as it is.
    names = [name for name in subprocess.check_output(copy, text=True).split("\0") if name]
    for name in names:
        target = folder / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_", "PYTHON"))}
    packages = [folder / "site", sysconfig.get_paths()["purelib"]]
    return clean | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder outside the repository."""
    return tmp_path_factory.mktemp("empty")


def eopd(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "eopd", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_starts_from_an_empty_folder(folder, environment):
    where = "import eopd; print(eopd.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=folder, env=environment, text=True)
    assert Path(found.strip()).is_relative_to(environment["PYTHONPATH"].split(os.pathsep)[0])

    assert eopd(folder, environment, "init", "tiny").splitlines()[-1] == (
        "next: eopd models tiny && eopd train configs/tiny.yaml"
    )
    assert (folder / "configs/prompts/demo_train.jsonl").is_file()
    models = eopd(folder, environment, "models", "tiny").splitlines()
    assert all(Path(line).is_relative_to(environment["HOME"]) for line in models)
    assert "prompts     320 to train, 64 held out" in eopd(folder, environment, "check", "configs/tiny.yaml")

    settings = ["run.batches=2", "evaluation.prompts=4", "cluster.cpus=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    eopd(folder, environment, "train", "configs/tiny.yaml", *options)
    assert (folder / "runs/tiny/report.html").is_file()
    assert (folder / "runs/tiny/hf/config.json").is_file()
