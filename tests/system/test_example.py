"""The project in ``examples/``, as its README says to run it: outside of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example import EXAMPLE, require_its_functions_took_part, settings

EOPD = str(Path(sys.executable).with_name("eopd"))


@pytest.fixture
def project(tmp_path):
    """A copy of the project, at a place of its own."""
    return shutil.copytree(EXAMPLE, tmp_path / "project")


@pytest.mark.slow
def test_a_project_brings_functions_of_its_own(program, project):
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [EOPD, *arguments],
            cwd=project,
            env=program.environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    runs = project / "runs"
    run("train", "config.yaml", *settings(program, runs), "--set", "cluster.cpus=2")
    require_its_functions_took_part(runs / "letters")

    graded = run(
        "eval",
        str(runs / "letters" / "hf"),
        "data/held_out.jsonl",
        *("--grader", "letters.grader:has_all"),
        *("--n", "2", "--max-response-tokens", "24", "--dtype", "float32"),
    )
    assert "16 answers: " in graded and " 0 not graded" in graded
    assert not program.left_behind()
