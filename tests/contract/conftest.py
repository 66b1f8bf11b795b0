"""What the contract tests share."""

import sys
from types import SimpleNamespace

import pytest
from processes import ForkedEngine


@pytest.fixture(scope="session", autouse=True)
def _engines_are_forked() -> None:
    """vLLM's engines that are no threads. Who tests a learner alone has not imported vLLM."""
    if "vllm" in sys.modules:
        from vllm.v1.engine import utils

        utils.get_mp_context = lambda: SimpleNamespace(Process=ForkedEngine)
