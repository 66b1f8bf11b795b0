"""Workers that can do the same, as one: who gets which request, and when.

    requests, lowest priority number first        workers, each with so many seats
    ──────── wait in the driver ────────▶ the one with the most free seats ──▶ answer
                  ▲                                    │
                  └── its worker is lost ◀─────────────┘

What a worker holds is bounded by its seats, so its deadline runs only while it works. What happens
to a request when

    its worker dies                           it goes to another worker, and keeps its place
    it misses the deadline, and the worker
        does not answer a ping                the worker is lost: as above, for all that it holds
        answers it                            the request failed: ``NoAnswerError``

A lost worker costs a request nothing, however often. Who is started in the place of a lost worker
is said in ``fleet.py``.
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
    """A worker that is well did not answer this request in time; says how long it had."""


@dataclass(slots=True, eq=False)
class _Member(Generic[W]):
    """One worker. ``started`` says of every request it holds since when, the oldest first."""

    number: int
    worker: W
    seats: int
    lost: asyncio.Future[None]
    started: dict[object, float] = field(default_factory=dict)
    draining: bool = False
    ping: asyncio.Task[bool] | None = None

    @property
    def takes_work(self) -> bool:
        return not self.draining and len(self.started) < self.seats


class Pool(Generic[W]):
    """Hands requests out to workers of one kind, which come and go.

    Args:
        name: of one of them, for messages: ``rollout engine``.
        timeout_s: an answer that takes longer is missed.
        ping: asks a worker for any answer; what it raises or ``PING_S`` of silence tells that the
            worker is lost.
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
        """How many workers take requests."""
        return sum(not member.draining for member in self._members.values())

    @property
    def in_flight(self) -> dict[int, int]:
        """How many requests each worker holds, by its number."""
        return {number: len(member.started) for number, member in self._members.items()}

    def __contains__(self, number: int) -> bool:
        """Whether worker ``number`` takes requests."""
        return number in self._members and not self._members[number].draining

    def add(self, number: int, worker: W, seats: int) -> None:
        """Take in a worker that holds up to ``seats`` requests at a time, under a number that
        is free.
        """
        lost = asyncio.get_running_loop().create_future()
        self._members[number] = _Member(number, worker, seats, lost)
        self._hand_out()

    def lose(self, number: int, reason: str) -> None:
        """Give up worker ``number``, if it is still there: others get what it holds, and
        ``on_loss`` is told why.
        """
        member = self._members.pop(number, None)
        if member is None:
            return

        member.lost.set_result(None)
        self.on_loss(number, reason)

    async def drain(self, number: int) -> None:
        """Give worker ``number`` no more requests; returns once it holds none, or is lost,
        and is forgotten.
        """
        member = self._members.get(number)
        if member is None:
            return

        member.draining = True
        while member.started and not member.lost.done():
            await asyncio.sleep(0.1)

        self._members.pop(number, None)

    def fail(self, error: Exception) -> None:
        """Nobody will come any more: whoever waits, or asks later, gets ``error``."""
        self._error = error
        for _, _, waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(error)

        self._waiting = []

    async def run(self, work: Callable[[W], Awaitable[R]], priority: int = 0) -> R:
        """Do ``work`` on one worker after the other, until one of them answers.

        Args:
            work: one request.
            priority: of two requests that wait, the one with the lower number goes first.

        Raises:
            NoAnswerError: a worker that is well did not answer it in time.
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
        """What each worker does now, for people."""
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
        """Wait in turn for a worker with a free seat; it is held for ``request``."""
        if self._error is not None:
            raise self._error

        heapq.heappush(self._waiting, (*place, request))
        self._hand_out()

        try:
            return await request
        except asyncio.CancelledError:
            if request.done() and not request.cancelled():  # given a seat in the same moment
                request.result().started.pop(request, None)
                self._hand_out()

            raise

    def _hand_out(self) -> None:
        """Give free seats to those who wait."""
        while self._waiting:
            if self._waiting[0][-1].done():  # cancelled
                heapq.heappop(self._waiting)
                continue

            free = [member for member in self._members.values() if member.takes_work]
            if not free:
                return

            member = min(free, key=lambda member: len(member.started) / member.seats)
            request = heapq.heappop(self._waiting)[-1]
            member.started[request] = time.monotonic()
            request.set_result(member)

    async def _serve(
        self, member: _Member[W], work: Callable[[W], Awaitable[R]]
    ) -> tuple[R] | None:
        """The answer of one worker; None if it is lost."""
        answer: asyncio.Future[Any] = asyncio.ensure_future(work(member.worker))
        try:
            ends: set[asyncio.Future[Any]] = {answer, member.lost}
            await asyncio.wait(ends, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
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
        """Ping a worker that missed a deadline, once for all its requests; one that is silent
        is lost.
        """
        if member.ping is None:
            member.ping = asyncio.create_task(self._answers(member.worker))

        answers = await asyncio.shield(member.ping)
        member.ping = None
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
        """Give up this very worker: another one may have its number by now."""
        if self._members.get(member.number) is member:
            self.lose(member.number, reason)
