"""Admission slots and take order: staleness bounded by construction.

A trajectory holds one of ``B (1 + s - L)`` slots from its admission until the batch that consumed it is *published* (B
batch size, s ``max_staleness``, L ``lookahead``). Batch number k takes the B ready trajectories with the lowest issue
numbers, and may be taken only when it leaves no number below ``B (k + 1 - L)`` behind: 0 is strict order, L lets a slow
trajectory be overtaken for L batches and no longer. (A run that goes on with another B counts from what it has consumed
so far, which stands for ``B k``.)

Bound: trajectory n is consumed by batch ``floor(n / B) + L`` at the latest, when the learner is at that version. It was
admitted when fewer than ``B (1 + s - L)`` numbers up to n were unpublished, so at version ``floor(n / B) + L - s`` at
the earliest. Its staleness is at most s. Slots alone do not bound staleness: with an unbounded take order one slow
trajectory can be overtaken for ever.
"""

import asyncio
import itertools
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
    """Between scoring and training. ``next_unconsumed`` and ``consumed_ahead`` start where a ledger left off.

    An offer costs the same however many are ready: the learner is woken when a batch is full, not to look for one.
    """

    batch: int
    max_staleness: int
    lookahead: int
    next_unconsumed: int = 0
    consumed_ahead: set[int] = field(default_factory=set)
    num_in_flight: int = 0
    closed: bool = False
    _ready: dict[int, _Offer] = field(init=False, default_factory=dict)
    _ready_by_version: dict[int, set[int]] = field(init=False, default_factory=dict)  # the oldest that wrote in it
    _next_missing: int = field(init=False)  # nothing below is missing: all is consumed or ready
    _oldest_allowed: int = field(init=False, default=0)
    _slot_freed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _take_may_go_on: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._next_missing = self.next_unconsumed

    @property
    def num_slots(self) -> int:
        """How many trajectories may be admitted and unpublished at a time."""
        return self.batch * (1 + self.max_staleness - self.lookahead)

    @property
    def num_ready(self) -> int:
        """Scored and waiting."""
        return len(self._ready)

    @property
    def next_missing(self) -> int:
        """The lowest issue number that is neither consumed nor ready."""
        while self._next_missing in self._ready or self._next_missing in self.consumed_ahead:
            self._next_missing += 1
        return self._next_missing

    async def admit(self) -> None:
        """Wait for a free slot and hold it."""
        while self.num_in_flight >= self.num_slots:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self.num_in_flight += 1

    async def offer(self, issue: int, stored: Stored[ScoredTrajectory]) -> bool:
        """Hand in a scored trajectory and wait for its fate.

        Returns:
            True when a batch consumed it; False when it was too stale: the slot is still held, sample it again.
        """
        version = stored.header.oldest_version
        if version < self._oldest_allowed:
            return False
        offer = _Offer(stored, asyncio.get_running_loop().create_future())
        self._ready[issue] = offer
        self._ready_by_version.setdefault(version, set()).add(issue)
        if self._is_full():
            self._take_may_go_on.set()
        return await offer.consumed

    async def take(self, version: int) -> list[Taken]:
        """Wait for a full batch at learner version ``version``; too stale ones are turned away first.

        Returns:
            A full batch, or nothing once the buffer is closed.
        """
        self._turn_away_older_than(version - self.max_staleness)
        while not self.closed:
            if self._is_full():
                return [self._consume(issue) for issue in self._lowest()]
            self._take_may_go_on.clear()
            await self._take_may_go_on.wait()
        return []

    async def close(self) -> None:
        """Give out no further batch; whoever waits for one gets nothing."""
        self.closed = True
        self._take_may_go_on.set()

    async def release(self, count: int) -> None:
        """Free the slots of a batch, once the weights it made are published."""
        self.num_in_flight -= count
        self._slot_freed.set()

    def _is_full(self) -> bool:
        """Whether a batch is ready that leaves nothing overdue behind."""
        if len(self._ready) < self.batch:
            return False
        num_consumed = self.next_unconsumed + len(self.consumed_ahead)
        return self.next_missing >= num_consumed + self.batch * (1 - self.lookahead)

    def _lowest(self) -> list[int]:
        admitted = self.num_slots + len(self.consumed_ahead)  # from next_unconsumed on, each with a slot or consumed
        numbers = range(self.next_unconsumed, self.next_unconsumed + admitted)
        return list(itertools.islice(filter(self._ready.__contains__, numbers), self.batch))

    def _consume(self, issue: int) -> Taken:
        stored = self._withdraw(issue, consumed=True)
        self.consumed_ahead.add(issue)
        while self.next_unconsumed in self.consumed_ahead:
            self.consumed_ahead.remove(self.next_unconsumed)
            self.next_unconsumed += 1
        return Taken(issue, stored)

    def _turn_away_older_than(self, oldest_allowed: int) -> None:
        self._oldest_allowed = oldest_allowed
        for version in [v for v in self._ready_by_version if v < oldest_allowed]:
            for issue in list(self._ready_by_version[version]):
                self._withdraw(issue, consumed=False)
                self._next_missing = min(self._next_missing, issue)

    def _withdraw(self, issue: int, *, consumed: bool) -> Stored[ScoredTrajectory]:
        offer = self._ready.pop(issue)
        version = offer.stored.header.oldest_version
        self._ready_by_version[version].remove(issue)
        if not self._ready_by_version[version]:
            del self._ready_by_version[version]
        offer.consumed.set_result(consumed)
        return offer.stored
