"""Some signals ask a run to end: Ctrl-C, and those of a scheduler, or of a terminal that closes. So
does ``eopd stop``, from any machine, with a file.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, Never

from eopd.config import ConfigError
from eopd.run.stopping import take_request
from eopd.runtime.logs import logger

# Slurm sends SIGUSR1 before a job's time is up, where it was told to (``--signal=USR1@300``).
OF_THE_DRIVER: Final = (signal.SIGHUP, signal.SIGUSR1)
ASK_TO_END: Final = (signal.SIGINT, signal.SIGTERM, *OF_THE_DRIVER)
POLL_S: Final = 1.0  # between two looks for a request of ``eopd stop``
ECHO_S: Final = 5.0  # a sweep hands a signal on within less, also on a busy machine


class Requests:
    """What has asked this process to end, and which of it was one request that came in two ways.

    Ray sends SIGTERM to a job and to all that the job has started, and the sweep in it then sends
    SIGINT to its runs; systemd lets a SIGHUP follow a SIGTERM. A person who is in a hurry repeats the
    same.
    """

    def __init__(self) -> None:
        self._kinds: set[int | None] = set()
        self._at = 0.0

    def add(self, kind: int | None) -> bool:
        """Takes a request, by the number of a signal, or None for others; returns whether it counts:
        the first of another kind within ``ECHO_S`` of one that counts is its echo.
        """
        now = time.monotonic()
        if self._kinds and kind not in self._kinds and now - self._at < ECHO_S:
            self._kinds.add(kind)
            return False

        self._kinds, self._at = {kind}, now
        return True


class Interruption:
    """A person or a scheduler asks the run to end: softly the first time, where the run can.

    ``say`` is told what happens now; at first that is the log.
    """

    def __init__(self) -> None:
        self.requested = False
        self.say: Callable[[str], None] = logger.info
        self._requests = Requests()
        self._close: Callable[[], Coroutine[object, object, None]] | None = None
        self._closing: asyncio.Task[None] | None = None

    @contextmanager
    def ends_softly(self, close: Callable[[], Coroutine[object, object, None]]) -> Iterator[None]:
        """While the block runs, the first signal calls ``close``, after which the block ends by
        itself.
        """
        self._close = close
        try:
            yield
        finally:
            self._close = None

    def take(self, kind: int | None = None, *, now: bool = False) -> bool:
        """Takes a signal, by its number, or a request of ``eopd stop``, which may be to end ``now``;
        returns False where the run must be cancelled.
        """
        if not self._requests.add(kind) and not now:
            return True

        first, self.requested = not self.requested, True
        if now or not first or self._close is None:
            self.say("stopping now")
            return False

        self.say("stopping after the step under way, with a checkpoint; once more to stop at once")
        # kept: the loop holds tasks weakly
        self._closing = asyncio.create_task(self._close())

        return True


def require_main_thread() -> None:
    """Checks that signals can be handled here, and a loop be run.

    Raises:
        ConfigError: this is another thread than the main one, or the cell of a notebook.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("a run takes signals, and so needs the main thread of a process")

    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigError(
            "an event loop is running here, as in a notebook; start the run as a process of its "
            "own: !eopd train CONFIG"
        )


@contextmanager
def caught(interrupt: Callable[[int], bool], main: "asyncio.Task[object] | None") -> Iterator[None]:
    """Handles each signal that asks to end like Ctrl-C, while the block runs: ``interrupt`` is
    called with its number, and the main task is cancelled where that returns False.

    An ignored SIGHUP stays ignored: so a run under ``nohup`` outlives its terminal. An ignored SIGINT
    is handled all the same: shells let background jobs ignore it, and ``kill -INT`` is meant for the
    run.
    """
    assert main is not None
    loop = asyncio.get_running_loop()
    numbers = _heard()
    for number in numbers:
        loop.add_signal_handler(number, lambda kind: interrupt(kind) or main.cancel(), number)

    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def interrupting() -> Iterator[None]:
    """Lets each signal that asks to end interrupt the block at once, as Ctrl-C does, where no loop runs
    yet. Other threads than the main one get no signals.

    Raises:
        KeyboardInterrupt: one came.
    """

    def interrupt(number: int, frame: FrameType | None) -> Never:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    numbers = _heard() if is_main else []
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def heed(directory: Path) -> None:
    """Does what ``eopd stop`` asks of the run in ``directory``, where no loop runs yet.

    Raises:
        KeyboardInterrupt: it asks the run to end.
    """
    if take_request(directory) is not None:
        raise KeyboardInterrupt


def _heard() -> list[signal.Signals]:
    outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in ASK_TO_END if number != signal.SIGHUP or not outlives_terminal]


@contextmanager
def obeyed(
    directory: Path, interruption: Interruption, main: "asyncio.Task[object] | None"
) -> Iterator[None]:
    """Handles what ``eopd stop`` asks of the run in ``directory`` like a signal, while the block
    runs; with ``--now`` the main task is cancelled.
    """
    assert main is not None

    async def look() -> Never:
        while True:
            await asyncio.sleep(POLL_S)
            now = take_request(directory)
            if now is not None and not interruption.take(now=now):
                main.cancel()

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()


@contextmanager
def ignored_by_children() -> Iterator[None]:
    """Lets every process that the block starts, with its children, ignore the signals that are for
    the driver alone.

    A terminal and Slurm send them to every process of the job. Ray's processes would end at once,
    and with them the step that the driver is to finish and save.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in OF_THE_DRIVER}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
