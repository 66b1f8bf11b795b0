"""The signals that ask a run to end: Ctrl-C, and what a scheduler or a terminal that closes
sends.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

# Slurm sends SIGUSR1 before a job's time is up, where it was told to (``--signal=USR1@300``).
OF_THE_DRIVER: Final = (signal.SIGHUP, signal.SIGUSR1)
ASK_TO_END: Final = (signal.SIGINT, signal.SIGTERM, *OF_THE_DRIVER)


@contextmanager
def caught(interrupt: Callable[[], bool], main: "asyncio.Task[object] | None") -> Iterator[None]:
    """Each is treated as Ctrl-C: ``interrupt`` first, and the main task is cancelled where that
    says False.

    An ignored SIGHUP stays ignored: so ``nohup`` lets a run outlive its terminal. SIGINT is taken
    all the
    same: shells let jobs in the background ignore it, and ``kill -INT`` is meant for the run.
    """
    assert main is not None
    loop = asyncio.get_running_loop()
    outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in ASK_TO_END if number != signal.SIGHUP or not outlives_terminal]
    for number in numbers:
        loop.add_signal_handler(number, lambda: interrupt() or main.cancel())

    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def ignored_by_children() -> Iterator[None]:
    """Whatever process is started within, and all that it starts, ignores the signals that are for
    the driver alone.

    A terminal and Slurm send them to every process of the job. Those of Ray would end at once, and
    with them the step that the driver still wants to finish and save.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in OF_THE_DRIVER}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
