"""The wheel alone, in an empty folder: what ``pip install`` brings is enough to start with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables under which Python finds the wheel before this environment's own packages,
    and no checkout.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    wheels = folder / "wheels"
    site = folder / "site"

    for name in ("eopd", "configs"):  # copied, since building writes into the folder that it builds
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )

    page = Path("docs/configuration-reference.md")
    (source / page).parent.mkdir()
    shutil.copy(ROOT / page, source / page)

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_", "PYTHON"))}

    return clean | {"PYTHONPATH": str(site), "HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder outside the repository."""
    return tmp_path_factory.mktemp("empty")


def eopd(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "eopd", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    return done.stdout


@pytest.mark.slow
def test_a_wheel_starts_from_an_empty_folder(folder, environment):
    where = "import eopd; print(eopd.__file__)"
    found = subprocess.check_output(
        [sys.executable, "-c", where],
        cwd=folder,
        env=environment,
        text=True,
    )
    assert Path(found.strip()).is_relative_to(environment["PYTHONPATH"])

    assert eopd(folder, environment, "init", "tiny").splitlines()[-1] == (
        "next: eopd models tiny && eopd train configs/tiny.yaml"
    )
    assert (folder / "configs/prompts/demo_train.jsonl").is_file()
    assert eopd(folder, environment, "config", "schema").startswith("{")
    assert eopd(folder, environment, "config", "docs").startswith("# Configuration reference")
    models = eopd(folder, environment, "models", "tiny").splitlines()
    assert all(Path(line).is_relative_to(environment["HOME"]) for line in models)
    assert "prompts     320 to train, 64 held out" in eopd(
        folder, environment, "check", "configs/tiny.yaml"
    )

    small = ["run.batches=2", "evaluation.prompts=4", "rollout.engines=1", "learner.ranks=1"]
    settings = [*small, "cluster.cpus=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    eopd(folder, environment, "train", "configs/tiny.yaml", *options)
    assert (folder / "runs/tiny/report.html").is_file()
    assert (folder / "runs/tiny/hf/config.json").is_file()
