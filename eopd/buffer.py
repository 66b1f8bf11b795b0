"""Admission slots and take order: staleness bounded by construction.

A trajectory holds one of ``B (1 + s - L)`` slots from its admission until the batch that consumed it is *published* (B
batch size, s ``max_staleness``, L ``lookahead``). Batch number k takes the B ready trajectories with the lowest issue
numbers, and may be taken only when it leaves no number below ``B (k + 1 - L)`` behind: 0 is strict order, L lets a slow
trajectory be overtaken for L batches and no longer.

Bound: trajectory n is consumed by batch ``floor(n / B) + L`` at the latest, when the learner is at that version. It was
admitted when fewer than ``B (1 + s - L)`` numbers up to n were unpublished, so at version ``floor(n / B) + L - s`` at
the earliest. Its staleness is at most s. Slots alone do not bound staleness: with an unbounded take order one slow
trajectory can be overtaken for ever.
"""

import asyncio
from dataclasses import dataclass, field

from eopd.types import ScoredTrajectory, Stored


@dataclass(slots=True)
class _Offer:
    stored: Stored[ScoredTrajectory]
    consumed: asyncio.Future[bool]


@dataclass(frozen=True, slots=True)
class Taken:
    """One consumed trajectory and its issue number."""

    issue: int
    stored: Stored[ScoredTrajectory]


@dataclass(slots=True)
class Buffer:
    """Between scoring and training. ``next_unconsumed`` and ``consumed_ahead`` start where a ledger left off."""

    batch: int
    max_staleness: int
    lookahead: int
    next_unconsumed: int = 0
    consumed_ahead: set[int] = field(default_factory=set)
    num_in_flight: int = 0
    closed: bool = False
    _ready: dict[int, _Offer] = field(init=False, default_factory=dict)
    _changed: asyncio.Condition = field(init=False, default_factory=asyncio.Condition)

    @property
    def num_slots(self) -> int:
        """How many trajectories may be admitted and unpublished at a time."""
        return self.batch * (1 + self.max_staleness - self.lookahead)

    @property
    def num_ready(self) -> int:
        """Scored and waiting."""
        return len(self._ready)

    async def admit(self) -> None:
        """Wait for a free slot and hold it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.num_in_flight < self.num_slots)
            self.num_in_flight += 1

    async def offer(self, issue: int, stored: Stored[ScoredTrajectory]) -> bool:
        """Hand in a scored trajectory and wait for its fate.

        Returns:
            True when a batch consumed it; False when it was too stale: the slot is still held, sample it again.
        """
        offer = _Offer(stored, asyncio.get_running_loop().create_future())
        async with self._changed:
            self._ready[issue] = offer
            self._changed.notify_all()
        return await offer.consumed

    async def take(self, version: int) -> list[Taken]:
        """Wait for a full batch at learner version ``version``; too stale ones are turned away first.

        Returns:
            A full batch, or nothing once the buffer is closed.
        """
        async with self._changed:
            while not self.closed:
                self._turn_away_stale(version)
                candidates = sorted(self._ready)[: self.batch]
                if len(candidates) == self.batch and self._leaves_nothing_overdue(candidates):
                    return [self._consume(issue) for issue in candidates]
                await self._changed.wait()
            return []

    async def close(self) -> None:
        """Give out no further batch; whoever waits for one gets nothing."""
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def release(self, count: int) -> None:
        """Free the slots of a batch, once the weights it made are published."""
        async with self._changed:
            self.num_in_flight -= count
            self._changed.notify_all()

    def _leaves_nothing_overdue(self, candidates: list[int]) -> bool:
        number = (self.next_unconsumed + len(self.consumed_ahead)) // self.batch
        due = range(self.next_unconsumed, self.batch * (number + 1 - self.lookahead))
        return self.consumed_ahead.union(candidates).issuperset(due)

    def _consume(self, issue: int) -> Taken:
        offer = self._ready.pop(issue)
        offer.consumed.set_result(True)
        self.consumed_ahead.add(issue)
        while self.next_unconsumed in self.consumed_ahead:
            self.consumed_ahead.remove(self.next_unconsumed)
            self.next_unconsumed += 1
        return Taken(issue, offer.stored)

    def _turn_away_stale(self, version: int) -> None:
        oldest = version - self.max_staleness
        for issue in [i for i, offer in self._ready.items() if offer.stored.header.oldest_version < oldest]:
            self._ready.pop(issue).consumed.set_result(False)
