"""Workers of one kind by number: started together, replaced when they are lost, more or fewer on
request.

    spawn ─▶ start ─▶ join ─▶ in the pool ─▶ lost ─▶ end ─▶ spawn again, under the same number
                                   └──────── drain ─▶ end                     (fewer on request)

    start   takes at most ``start_timeout_s``
    join    what a newcomer needs before it gets requests; waiting for others in it is not its own start

A worker that is lost is counted once, however long it takes to start another: there may be no room
until a node comes back, and the run goes on with the others meanwhile. With nobody left, and nobody
started within ``start_timeout_s``, the fleet fails, with the causes.

Example: 64 engines, 8 of them on a node that is lost. The budget is 8 poorer, 56 write on, 8 starts
are tried again and again, and succeed when the node is back.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from eopd.pool import Pool
from eopd.run.progress import first_line
from eopd.types import RunFailedError

W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)

# before each attempt to start another; the last one again and again
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class NobodyLeftError(RunFailedError):
    """No worker of a kind is left, and none could be started in time; names the causes."""


class Body(Protocol[W_co]):
    """The process of one worker."""

    @property
    def worker(self) -> W_co:
        """The worker in its role."""
        ...

    async def start(self) -> int:
        """Bring it up; returns how many requests it holds at a time."""
        ...

    async def end(self) -> None:
        """End it, whatever state it is in."""
        ...


class Fleet(Generic[W]):
    """The workers of one kind.

    Args:
        name: of one of them, for messages: ``rollout engine``.
        pool: hands out requests to those that are up.
        spawn: makes the bodies of new workers, by number.
        size: how many there are at first.
        spend: told of every loss; what it raises ends the fleet.
        start_timeout_s: of one start.
        say: told what people want to know.
    """

    def __init__(
        self,
        name: str,
        pool: Pool[W],
        *,
        spawn: Callable[[Sequence[int]], Sequence[Body[W]]],
        size: int,
        spend: Callable[[str], None],
        start_timeout_s: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = name
        self.pool = pool
        self.num_replacements = 0
        self.join: Callable[[int, W], Awaitable[None]] = _nothing
        self.leave: Callable[[int], Awaitable[None]] = _nothing  # of one that is lost
        self.part: Callable[[int], Awaitable[None]] = _nothing  # of one that is well
        self._spawn = spawn
        self._spend = spend
        self._say = say
        self._start_timeout_s = start_timeout_s
        self._bodies = dict(enumerate(spawn(range(size))))
        # by the number that is being replaced
        self._tasks: dict[int | None, asyncio.Task[None]] = {}
        self._causes: list[str] = []
        self._started = asyncio.Event()  # since somebody was last needed
        self._closed = False
        self._leaving: set[int] = set()  # nobody comes in the place of these
        pool.on_loss = self._on_loss

    @property
    def size(self) -> int:
        """How many run or are being replaced."""
        return len(self._bodies)

    @property
    def workers(self) -> Mapping[int, W]:
        """All of them in their role, by number, up or not."""
        return {number: body.worker for number, body in self._bodies.items()}

    def start(self) -> Mapping[str, Awaitable[None]]:
        """Start those there are at first; one awaitable for each, by name. Nobody is waited
        for to join.
        """
        return {f"{self.name} {number}": self._start_first(number) for number in self._bodies}

    async def scale(self, size: int) -> None:
        """Bring the fleet to another size: newcomers start together, those that take no requests go
        first.

        Raises:
            TimeoutError: a newcomer did not start in time: there may be no room. Those that came up
                stay.
            WorkerDownError: one died.
        """
        by_use = sorted(self._bodies, key=lambda number: (number in self.pool, -number))
        for number in by_use[: max(0, self.size - size)]:
            await self._dismiss(number)

        first = max(self._bodies) + 1
        numbers = range(first, first + size - self.size)
        outcomes = await asyncio.gather(*map(self._bring_up, numbers), return_exceptions=True)
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                await self._bodies.pop(number).end()

        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def close(self) -> None:
        """Replace nobody any more."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()

        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_first(self, number: int) -> None:
        body = self._bodies[number]
        self.pool.add(number, body.worker, await body.start())

    async def _bring_up(self, number: int) -> None:
        """Start one under a number that is free, let it join, and put it to work."""
        (body,) = self._spawn([number])
        self._bodies[number] = body
        async with asyncio.timeout(self._start_timeout_s):
            seats = await body.start()

        self._started.set()
        await self.join(number, body.worker)
        self.pool.add(number, body.worker, seats)

    async def _dismiss(self, number: int) -> None:
        if number in self._tasks:  # nobody needs another one in its place
            self._tasks[number].cancel()
            await asyncio.gather(self._tasks[number], return_exceptions=True)

        self._leaving.add(number)
        await self.pool.drain(number)
        await self.part(number)
        await self._bodies.pop(number).end()
        self._leaving.remove(number)

    def _on_loss(self, number: int, reason: str) -> None:
        if self._closed or number in self._leaving or number not in self._bodies:
            return

        cause = f"{self.name} {number}: {reason.splitlines()[0]}"

        try:
            self._spend(cause)
        except RunFailedError as error:
            self.pool.fail(error)
            return

        self._causes.append(cause)
        self._say(
            f"{cause}; going on with {self.pool.num_up} of {self.size} while another one is started"
        )
        self._do(number, self._replace(number))
        self._expect_somebody()

    async def _replace(self, number: int) -> None:
        """Start another one in the place of number ``number``, for as long as it takes."""
        await self.leave(number)
        await self._bodies[number].end()
        attempt = 0

        while True:
            await asyncio.sleep(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
            try:
                await self._bring_up(number)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting, it is tried again, and told
                self._say_once(f"{self.name} {number} did not start: {first_line(error)}")
                await self._bodies[number].end()
                self._expect_somebody()
                attempt += 1
                continue

            self.num_replacements += 1
            self._causes.clear()
            self._say(f"{self.name} {number} is up again: {self.pool.num_up} of {self.size}")
            return

    def _expect_somebody(self) -> None:
        """With nobody left, give newcomers the time of one start."""
        if self.pool.num_up == 0 and None not in self._tasks:
            self._started.clear()
            self._do(None, self._give_up())

    async def _give_up(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._started.wait()
        except TimeoutError:
            causes = "\n".join(f"  {cause}" for cause in self._causes)
            limit = f"cluster.start_timeout_s = {self._start_timeout_s:g}"
            self.pool.fail(
                NobodyLeftError(
                    f"no {self.name} is left, and none came up within {limit}:\n{causes}"
                )
            )

    def _say_once(self, text: str) -> None:
        if text not in self._causes:
            self._causes.append(text)
            self._say(f"{text}; trying again")

    def _do(self, key: int | None, work: Coroutine[object, object, None]) -> None:
        self._tasks[key] = task = asyncio.create_task(work)
        task.add_done_callback(
            lambda _: self._tasks.pop(key) if self._tasks.get(key) is task else None
        )


async def _nothing(*arguments: object) -> None:
    """What most workers do to join and to leave."""
