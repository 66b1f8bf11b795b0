"""The process of the ``eopd`` command, also of ``python -m eopd``."""

import logging
import signal
import sys


class _Lines(logging.Formatter):
    """Shows what eopd logs without a traceback, which stands in the logs of a run."""

    def format(self, record: logging.LogRecord) -> str:
        is_ours = record.name.partition(".")[0] == "eopd"
        return record.getMessage() if is_ours else super().format(record)


def main() -> None:
    """Runs the command. A Ctrl-C ends it with one word, also while the rest is still being imported,
    and with none once all is said.
    """
    _log_in_lines()
    try:
        from eopd.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _log_in_lines() -> None:
    """Shows warnings that no run collects as lines, and none of ours again by the root logger, which
    functions of the user may configure.
    """
    last = logging.StreamHandler()
    last.setLevel(logging.WARNING)
    last.setFormatter(_Lines())
    logging.lastResort = last
    logging.getLogger("eopd").propagate = False


if __name__ == "__main__":
    main()
