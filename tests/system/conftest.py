"""What the system tests share."""

import os

import pytest
from program import Program


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Program:
    from eopd.models.tiny import write_tiny_pair

    root = tmp_path_factory.mktemp("system")
    write_tiny_pair(root / "models", family=os.environ.get("EOPD_TEST_FAMILY", "qwen3"))
    return Program(models=root / "models", runs=root / "runs")
