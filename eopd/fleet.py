"""A fleet holds the workers of one kind, by number. They start together; one that is lost is replaced
under its number; ``scale`` adds and removes workers.

    spawn ─▶ start ─▶ join ─▶ in the pool ─▶ lost ──▶ after_loss ──▶ end ─▶ spawn again
                                   └──────── drained ▶ after_drain ▶ end               (scale)

    start   brings up the worker's process, within ``start_timeout_s``
    join    prepares a newcomer for its first request, and may wait for other workers without a limit

A lost worker is counted once, however long its replacement takes: there may be no room until a node
is back, and the run continues with the other workers meanwhile. With no worker left, and none
that comes up within ``start_timeout_s``, the fleet fails with the causes; the time in which a
newcomer joins does not count. Where somebody else needs the room that is left, ``give_way`` leaves
it to him.

Example: 64 engines, 8 of them on a node that is lost.

    event                  in the pool   size   losses counted
    before                 64            64     0
    the node is lost       56            64     8                each of the 8 is started again,
    no room for them       56            64     8                  with growing pauses
    the node is back       64            64     8
    scale(60)              60            60     8                the highest numbers are drained
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from eopd.pool import Pool
from eopd.run.progress import first_line
from eopd.types import RunFailedError

W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)

# the pause before each attempt to start another worker; the last one is used again and again
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class NobodyLeftError(RunFailedError):
    """No worker of a kind is left, and none could be started in time; the message has the causes."""


class GaveWayError(Exception):
    """A start has ended for somebody else, who needs its room."""


class WorkerProcess(Protocol[W_co]):
    """A process that hosts one worker."""

    @property
    def worker(self) -> W_co:
        """Returns the worker in its role."""

    async def start(self) -> int:
        """Starts the worker; returns its seats, the number of requests that it holds at a time."""

    async def end(self) -> None:
        """Ends the process, whatever state it is in."""


class Fleet(Generic[W]):
    """A fleet starts, replaces, adds and removes the workers of one kind.

    ``join`` prepares a newcomer for requests. ``after_loss`` and ``after_drain`` are called with the
    number of a worker that was lost, and of one that was removed.

    Args:
        pool: hands out requests to the workers that are up.
        spawn: makes the processes of new workers, by number.
        size: the number of workers at first.
        count_loss: called with the cause of every loss; a ``RunFailedError`` of it fails the fleet.
        start_timeout_s: the time limit of one start.
        log: called with messages for people.
    """

    def __init__(
        self,
        pool: Pool[W],
        *,
        spawn: Callable[[Sequence[int]], Sequence[WorkerProcess[W]]],
        size: int,
        count_loss: Callable[[str], None],
        start_timeout_s: float,
        log: Callable[[str], None],
    ) -> None:
        self.pool = pool
        self.num_replacements = 0
        self.join: Callable[[int, W], Awaitable[None]] = _nothing
        self.after_loss: Callable[[int], Awaitable[None]] = _nothing
        self.after_drain: Callable[[int], Awaitable[None]] = _nothing
        self._spawn = spawn
        self._count_loss = count_loss
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._processes = dict(enumerate(spawn(range(size))))
        self._replacing: dict[int, asyncio.Task[None]] = {}  # also those that have ended
        self._giving_up: asyncio.TimerHandle | None = None  # while no worker is left
        self._causes: list[str] = []
        self._left_s = start_timeout_s  # until it fails, without the time of joins
        self._num_joining = 0
        self._starts: set[asyncio.Future[int]] = set()  # of replacements and newcomers
        self._may_start = asyncio.Event()
        self._may_start.set()
        pool.on_loss = self._on_loss

    @property
    def size(self) -> int:
        """Returns how many workers run or are being replaced."""
        return len(self._processes)

    @property
    def workers(self) -> Mapping[int, W]:
        """Returns all workers in their role, by number, up or not."""
        return {number: process.worker for number, process in self._processes.items()}

    def start(self) -> Mapping[str, Awaitable[None]]:
        """Starts the first workers, without ``join``; returns an awaitable for each, by name."""
        return {
            f"{self.pool.name} {number}": self._start_first(number) for number in self._processes
        }

    async def scale(self, size: int) -> None:
        """Brings the fleet to another size. Newcomers start together; workers that take no requests
        are removed first, and then those of the highest numbers.

        Raises:
            TimeoutError: a newcomer did not start in time: there may be no room. Those that came up
                stay.
            WorkerDownError: one died.
            GaveWayError: one has given way.
        """
        by_use = sorted(self._processes, key=lambda number: (number in self.pool, -number))
        for number in by_use[: max(0, self.size - size)]:
            await self._remove(number)

        first = max(self._processes) + 1
        numbers = range(first, first + size - self.size)
        outcomes = await asyncio.gather(*map(self._bring_up, numbers), return_exceptions=True)
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                await self._processes.pop(number).end()

        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    @contextmanager
    def give_way(self) -> Iterator[None]:
        """Leaves room to somebody else: whoever is still starting ends, and nobody starts before the
        end of this context. Meanwhile the fleet does not fail for having no worker, nor before the
        next attempt to start one has failed too.
        """
        self._may_start.clear()
        self._keep_up()
        for start in self._starts:
            start.cancel()

        try:
            yield
        finally:
            self._may_start.set()

    async def close(self) -> None:
        """Ends every replacement under way, and begins no other one."""
        self.pool.on_loss = lambda number, reason: None
        self._stop_clock()
        for task in self._replacing.values():
            task.cancel()

        await asyncio.gather(*self._replacing.values(), return_exceptions=True)

    async def _start_first(self, number: int) -> None:
        process = self._processes[number]
        self.pool.add(number, process.worker, await process.start())

    async def _bring_up(self, number: int) -> None:
        """Starts a worker under a free number, lets it join, and adds it to the pool."""
        await self._may_start.wait()
        (process,) = self._spawn([number])
        self._processes[number] = process
        start = asyncio.ensure_future(self._start_and_join(number, process))
        self._starts.add(start)
        try:
            await asyncio.wait([start])
        finally:
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            self._starts.remove(start)

        if start.cancelled():  # by ``give_way``: else this task would have been
            raise GaveWayError("it gives way to others, who find no room")

        self.pool.add(number, process.worker, start.result())
        self._keep_up()

    async def _start_and_join(self, number: int, process: WorkerProcess[W]) -> int:
        async with asyncio.timeout(self._start_timeout_s):
            seats = await process.start()

        self._num_joining += 1
        self._stop_clock()
        try:
            await self.join(number, process.worker)
        finally:
            self._num_joining -= 1

        return seats

    async def _remove(self, number: int) -> None:
        if (replacing := self._replacing.pop(number, None)) is not None:
            replacing.cancel()
            await asyncio.gather(replacing, return_exceptions=True)

        process = self._processes.pop(number)  # if it is lost from here on, it is not replaced
        await self.pool.drain(number)
        await self.after_drain(number)
        await process.end()

    def _on_loss(self, number: int, reason: str) -> None:
        if number not in self._processes:  # it was being removed
            return

        cause = f"{self.pool.name} {number}: {reason.splitlines()[0]}"

        try:
            self._count_loss(cause)
        except RunFailedError as error:
            self.pool.fail(error)
            return

        self._causes.append(cause)
        self._log(
            f"{cause}; going on with {self.pool.num_up} of {self.size} while another one is started"
        )
        self._replacing[number] = asyncio.create_task(self._replace(number))
        self._require_start()

    async def _replace(self, number: int) -> None:
        """Starts another worker under a number, again and again until one is up."""
        await self.after_loss(number)
        await self._processes[number].end()
        for pause_s in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
            await asyncio.sleep(pause_s)
            try:
                await self._bring_up(number)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting is logged, and tried again
                self._log_once(f"{self.pool.name} {number} did not start: {first_line(error)}")
                await self._processes[number].end()
                self._require_start()
            else:
                break

        self.num_replacements += 1
        self._causes.clear()
        self._log(f"{self.pool.name} {number} is up again: {self.pool.num_up} of {self.size}")

    def _require_start(self) -> None:
        """With no worker left, fails the pool unless one comes up in time."""
        if self.pool.num_up > 0 or not self._may_start.is_set():
            return

        if self._giving_up is None and not self._num_joining:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(self._left_s, self._give_up)

    def _keep_up(self) -> None:
        """Gives up no more: somebody is up, or leaves room to others."""
        self._stop_clock()
        self._left_s = self._start_timeout_s

    def _stop_clock(self) -> None:
        if self._giving_up is not None:
            self._left_s = self._giving_up.when() - asyncio.get_running_loop().time()
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        causes = "\n".join(f"  {cause}" for cause in self._causes)
        limit = f"cluster.start_timeout_s = {self._start_timeout_s:g}"
        self.pool.fail(
            NobodyLeftError(
                f"no {self.pool.name} is left, and none came up within {limit}:\n{causes}"
            )
        )

    def _log_once(self, text: str) -> None:
        if text not in self._causes:
            self._causes.append(text)
            self._log(f"{text}; trying again")


def one_by_one(starting: Mapping[str, Awaitable[object]]) -> dict[str, Awaitable[None]]:
    """Returns the same starts, of which each begins when the one before it has ended."""
    turn = asyncio.Lock()

    async def in_turn(started: Awaitable[object]) -> None:
        async with turn:
            await started

    return {name: in_turn(started) for name, started in starting.items()}


async def _nothing(*arguments: object) -> None:
    """Does nothing: most workers need nothing before the first request and after the last one."""
