"""What the system tests share."""

import os
from pathlib import Path

import pytest
from program import Program

# What oneDNN and torch take for a processor's best; forward and backward in bfloat16 are then 120
# times as slow.
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Program:
    from eopd.models.tiny import write_tiny_pair

    root = tmp_path_factory.mktemp("system")
    write_tiny_pair(root / "models", family=os.environ.get("EOPD_TEST_FAMILY", "qwen3"))
    return Program(models=root / "models", runs=root / "runs")


@pytest.fixture(scope="session")
def synchronous(program):
    """One run from beginning to end; shared."""
    done = program.run(*program.train("synchronous"))
    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "synchronous", done.stdout


@pytest.fixture(scope="session")
def without_bfloat16(program) -> Path:
    """A run of 15 steps on a processor without bfloat16; shared."""
    settings = (
        "run.batches=15",
        "student.dtype=auto",
        "teachers.0.dtype=auto",
        "rollout.engines=1",
        "learner.ranks=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AVX2_ALONE.items():
            patch.setenv(name, value)

        done = program.run(*program.train("avx2", *settings))

    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "avx2"
