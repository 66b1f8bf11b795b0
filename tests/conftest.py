"""Shared by all tests: environment of real engines, and tiny models made once a session."""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from eopd.planning.virtual import VirtualLoop
from eopd.runtime.placement import EAGER, vllm_env

os.environ.update(vllm_env(threads=1) | EAGER)
os.environ["DS_ACCELERATOR"] = "cpu"
settings.register_profile("eopd", deadline=None)  # an example may take long on a busy machine
settings.load_profile("eopd")

TEXTS = [
    "The river runs past the old mill and under the bridge.",
    "Add 3 and 4, then take away 2: the answer is 5.",
    "Name three fruits that are red. Apples, cherries and strawberries are red.",
    "Why is the sky blue? Because air scatters short waves of light more than long ones.",
]


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Gives the tests that are marked so a loop in virtual time, and the others one of asyncio."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}

    return {"real": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a tiny model directory: ``tiny_model("qwen3", seed=1, scale=0.2)``."""
    from eopd.models.tiny import build_model, train_tokenizer, write_model

    tokenizer = train_tokenizer(TEXTS, 320)
    root = tmp_path_factory.mktemp("models")

    def make(family: str, *, seed: int, scale: float = 0.02) -> Path:
        directory = root / f"{family}-{seed}-{scale}"
        if not directory.exists():
            write_model(
                directory,
                build_model(family, tokenizer, seed=seed, scale=scale),
                tokenizer,
            )

        return directory

    return make


@pytest.fixture(scope="session", autouse=True)
def _remember_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests in this process compute stays out of the user's cache."""
    from eopd import remember

    remember.DIRECTORY = tmp_path_factory.mktemp("remembered")
