"""What a command says must not end what it does."""

import logging
import os
import sys
from contextlib import suppress
from typing import TextIO, cast

logger = logging.getLogger(__name__)


class Lasting:
    """A text stream that outlives its reader: where a pipe is closed or a disk full, what is written
    from then on is dropped, and the log says so once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, if somebody takes it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Hands over what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()

        # only now: where nobody handles logs, this comes back as a write
        logger.warning("%s takes nothing more (%s); the run goes on", self._stream.name, error)


def write_anything() -> None:
    """Lets both streams write every text: what their encoding lacks becomes a question mark. A terminal
    that says it has no columns has the usual number.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


def outlive_readers() -> None:
    """Lets the process go on where nobody reads what it says."""
    sys.stdout = cast(TextIO, Lasting(sys.stdout))
    sys.stderr = cast(TextIO, Lasting(sys.stderr))
