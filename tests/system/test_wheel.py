"""The wheel alone, in an empty folder: what ``pip install`` brings is enough to start with, and to run
the project in ``examples/`` as its README says.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example import EXAMPLE, require_its_functions_took_part

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(program, tmp_path_factory) -> dict[str, str]:
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

    home = tmp_path_factory.mktemp("home")
    return program.environment() | {"PYTHONPATH": str(site), "HOME": str(home)}


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


@pytest.mark.slow
def test_a_project_brings_functions_of_its_own(program, folder, environment):
    project = shutil.copytree(EXAMPLE, folder / "project")
    eopd(project, environment, "models", "tiny")
    eopd(project, environment, "train", "config.yaml", "--set", "cluster.cpus=2")
    run = project / "runs" / "letters"
    require_its_functions_took_part(run)
    assert (run / "report.html").is_file()
    assert (run / "hf" / "config.json").is_file()

    options = ("--grader", "letters.grader:has_all", "--n", "2", "--max-response-tokens", "24")
    graded = eopd(project, environment, "eval", str(run / "hf"), "data/held_out.jsonl", *options)
    assert "16 answers: " in graded and " 0 not graded" in graded
    assert "avg@2" in graded and "pass@2" in graded
    assert program.left_behind() == []
