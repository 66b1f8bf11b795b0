"""A command as a user gives it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    """How a command ended, and what it showed."""

    code: int | str | None
    out: str
    err: str


@pytest.fixture(scope="session")
def checked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a config can name: it passes every check before the start of a run."""
    from eopd.models.tiny import build_model, train_tokenizer, write_model

    directory = tmp_path_factory.mktemp("models") / "model"
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
    write_model(directory, build_model("qwen3", tokenizer, seed=0, layers=1), tokenizer)
    return directory


@pytest.fixture
def eopd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Run a command in this process: ``eopd("train", path)``."""
    from eopd.cli.main import main

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["eopd", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()

        return Done(caught.value.code, *capsys.readouterr())

    return command
