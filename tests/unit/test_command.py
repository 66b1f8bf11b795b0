"""The process of the command: how it takes a Ctrl-C, and what it shows of the log."""

import logging
import signal
import sys
from types import SimpleNamespace

import pytest

from eopd.__main__ import main


@pytest.fixture
def run(monkeypatch):
    """Runs a function as the command, and gives the process back as it was."""
    logger, handler = logging.getLogger("eopd"), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    monkeypatch.setattr(logger, "propagate", logger.propagate)

    def command(work):
        monkeypatch.setitem(sys.modules, "eopd.cli.main", SimpleNamespace(main=work))
        main()

    yield command
    signal.signal(signal.SIGINT, handler)


def test_a_ctrl_c_is_one_word_and_none_once_all_is_said(run, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(interrupted)

    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_warning_that_no_run_collects_is_a_line(run, capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def warns():
        logging.basicConfig(level=logging.INFO, force=True)  # as a module of the user's may
        try:
            raise ValueError("deep down")
        except ValueError:
            logging.getLogger("eopd.runtime").warning("it did not start", exc_info=True)

        logging.getLogger("eopd").info("what a terminal shows by itself")
        logging.getLogger("users").info("theirs")

    run(warns)
    assert capsys.readouterr().err == "it did not start\nINFO:users:theirs\n"


def test_the_traceback_of_a_library_is_shown(run, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def warns():
        try:
            raise ValueError("deep down")
        except ValueError:
            logging.getLogger("asyncio").error("exception in a callback", exc_info=True)

    run(warns)
    assert "ValueError: deep down" in capsys.readouterr().err
