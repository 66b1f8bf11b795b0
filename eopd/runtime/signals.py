"""Ctrl-C and SIGTERM, while a run is under way."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def caught(interrupt: Callable[[], bool], main: "asyncio.Task[object] | None") -> Iterator[None]:
    """SIGTERM is treated as Ctrl-C: ``interrupt`` first, and the main task is cancelled where that says False."""
    assert main is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: interrupt() or main.cancel())
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
