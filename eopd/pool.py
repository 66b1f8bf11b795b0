"""A pool hands out requests to workers of one kind. A worker has *seats*: it holds as many requests
at a time, and the others wait in the driver.

    requests, lowest priority number first        workers, each with so many seats
    ──────── wait in the driver ────────▶ the one with the most free seats ──▶ answer
                  ▲                                    │
                  └── its worker is lost ◀─────────────┘

The deadline of a request runs only while a worker holds it.

    its worker dies                           it goes to another worker, and keeps its place
    it misses the deadline, and the worker
        does not answer a ping                the worker is lost: as above, for all that it holds
        answers it                            the request failed: ``NoAnswerError``

A lost worker costs a request nothing, however often. ``fleet.py`` replaces lost workers.

Example: two engines with 2 seats each, and the requests 0 to 4. Requests 0 and 2 are on engine 0, 1
and 3 on engine 1, and 4 waits. Engine 0 dies: 0 and 2 wait again, before 4. When request 1 is
answered, its seat goes to request 0.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from eopd.roles import WorkerDownError

W = TypeVar("W")
R = TypeVar("R")

PING_S = 30.0  # an engine answers between two steps, and a step on a busy CPU takes seconds


class NoAnswerError(RuntimeError):
    """A worker that is well did not answer this request in time; the message has the time limit."""


@dataclass(slots=True, eq=False)
class _Member(Generic[W]):
    """One worker of the pool. ``started`` has the start time of every request that it holds."""

    number: int
    worker: W
    seats: int
    lost: asyncio.Future[None]
    started: dict[object, float] = field(default_factory=dict)
    draining: bool = False
    ping: asyncio.Task[bool] | None = None


class Pool(Generic[W]):
    """A pool hands out requests to workers of one kind, which may be added and removed.

    Args:
        name: the name of one worker, for messages: ``rollout engine``.
        timeout_s: the time that a worker has for one request.
        ping: asks a worker for any answer. A worker that raises, or does not answer within
            ``PING_S``, is lost.
    """

    def __init__(
        self, name: str, *, timeout_s: float, ping: Callable[[W], Awaitable[object]]
    ) -> None:
        self.name = name
        self.num_failures = 0  # requests that came back without an answer
        self.on_loss: Callable[[int, str], None] = lambda number, reason: None
        self._timeout_s = timeout_s
        self._ping = ping
        self._members: dict[int, _Member[W]] = {}
        self._waiting: list[tuple[int, int, asyncio.Future[_Member[W]]]] = []
        self._tickets = itertools.count()
        self._error: Exception | None = None

    @property
    def num_up(self) -> int:
        """Returns how many workers take requests."""
        return sum(not member.draining for member in self._members.values())

    @property
    def in_flight(self) -> dict[int, int]:
        """Returns how many requests each worker holds, by its number."""
        return {number: len(member.started) for number, member in self._members.items()}

    def __contains__(self, number: int) -> bool:
        """Tells whether worker ``number`` takes requests."""
        return number in self._members and not self._members[number].draining

    def add(self, number: int, worker: W, seats: int) -> None:
        """Adds a worker of ``seats`` seats, under a number that is free."""
        lost = asyncio.get_running_loop().create_future()
        self._members[number] = _Member(number, worker, seats, lost)
        self._hand_out()

    def lose(self, number: int, reason: str) -> None:
        """Removes worker ``number``, if it is still there: its requests go to other workers, and
        ``on_loss`` is called with the reason.
        """
        member = self._members.pop(number, None)
        if member is None:
            return

        member.lost.set_result(None)
        self.on_loss(number, reason)

    async def drain(self, number: int) -> None:
        """Gives worker ``number`` no more requests, and removes it once it holds none or is lost."""
        member = self._members.get(number)
        if member is None:
            return

        member.draining = True
        while member.started and not member.lost.done():
            await asyncio.sleep(0.1)

        self._members.pop(number, None)

    def fail(self, error: Exception) -> None:
        """Fails every request that waits now or comes later with ``error``."""
        self._error = error
        for _, _, waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(error)

        self._waiting = []

    async def run(self, work: Callable[[W], Awaitable[R]], priority: int = 0) -> R:
        """Runs one request on one worker after the other, until one of them answers.

        Args:
            work: the request.
            priority: of two requests that wait, the one with the lower number goes first.

        Raises:
            NoAnswerError: a worker that is well did not answer in time.
        """
        place = (priority, next(self._tickets))
        while True:
            request = asyncio.get_running_loop().create_future()
            member = await self._seat(place, request)

            try:
                answer = await self._serve(member, work)
            finally:
                member.started.pop(request, None)
                self._hand_out()

            if answer is not None:
                return answer[0]

            self.num_failures += 1

    def status(self) -> list[str]:
        """Returns what each worker does now, a line each, for people."""
        lines = []
        now = time.monotonic()

        for number, member in sorted(self._members.items()):
            line = f"{self.name} {number}: {len(member.started)} of {member.seats} in flight"
            if member.started:
                line += f", the oldest for {now - min(member.started.values()):.0f} s"

            lines.append(line + (", takes no more" if member.draining else ""))

        waiting = sum(not request.done() for _, _, request in self._waiting)

        return [*lines, f"{self.name}: {waiting} wait for one"] if waiting else lines

    async def _seat(
        self, place: tuple[int, int], request: "asyncio.Future[_Member[W]]"
    ) -> _Member[W]:
        """Waits in turn for a free seat, takes it for ``request``, and returns its worker."""
        if self._error is not None:
            raise self._error

        heapq.heappush(self._waiting, (*place, request))
        self._hand_out()

        try:
            return await request
        except asyncio.CancelledError:
            # given a seat, or failed, in the same moment
            if request.done() and not request.cancelled() and request.exception() is None:
                request.result().started.pop(request, None)
                self._hand_out()

            raise

    def _hand_out(self) -> None:
        """Gives free seats to the requests that wait."""
        while self._waiting:
            if self._waiting[0][-1].done():  # cancelled
                heapq.heappop(self._waiting)
                continue

            member = self._most_free()
            if member is None:
                return

            request = heapq.heappop(self._waiting)[-1]
            member.started[request] = time.monotonic()
            request.set_result(member)

    def _most_free(self) -> _Member[W] | None:
        """Returns the worker of which the smallest share of seats is taken; None where all are full.

        It looks at thousands of workers for each request, so it is one plain loop.
        """
        found, least = None, 1.0
        for member in self._members.values():
            taken = len(member.started) / member.seats
            if taken < least and not member.draining:
                found, least = member, taken
                if not taken:
                    break

        return found

    async def _serve(
        self, member: _Member[W], work: Callable[[W], Awaitable[R]]
    ) -> tuple[R] | None:
        """Returns the answer of one worker in a tuple, or None if the worker is lost."""
        answer: asyncio.Future[Any] = asyncio.ensure_future(work(member.worker))
        try:
            events: set[asyncio.Future[Any]] = {answer, member.lost}
            await asyncio.wait(
                events,
                timeout=self._timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            is_well = answer.done() or (not member.lost.done() and await self._is_well(member))
            if answer.done():
                return (await answer,)

            if not is_well:
                return None

            self.num_failures += 1
            raise NoAnswerError(
                f"no answer of {self.name} {member.number} within {self._timeout_s:g} s"
            )
        except WorkerDownError as error:
            self._lose(member, str(error))
            return None
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _is_well(self, member: _Member[W]) -> bool:
        """Pings a worker that missed a deadline, once for all its requests. It is lost if it does
        not answer.
        """
        if member.ping is None or member.ping.done():
            member.ping = asyncio.create_task(self._answers(member.worker))

        answers = await asyncio.shield(member.ping)
        if not answers:
            self._lose(
                member, f"no answer within {self._timeout_s:g} s, nor to a ping within {PING_S:g} s"
            )

        return answers

    async def _answers(self, worker: W) -> bool:
        try:
            async with asyncio.timeout(PING_S):
                await self._ping(worker)
        except (WorkerDownError, TimeoutError):
            return False

        return True

    def _lose(self, member: _Member[W], reason: str) -> None:
        """Removes this worker, and not another one that has its number by now."""
        if self._members.get(member.number) is member:
            self.lose(member.number, reason)
