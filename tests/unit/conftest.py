"""A command as a user gives it."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    """How a command ended, and what it showed."""

    code: int | str | None
    out: str
    err: str


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
