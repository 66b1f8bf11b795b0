"""Admission slots and take order: staleness bounded by construction.

A trajectory holds one of ``B (1 + s - L)`` slots from its admission until the batch that consumed
it is *published* (B batch size, s ``max_staleness``, L ``lookahead``). Batch number k takes the B
ready trajectories with the lowest issue numbers, and may be taken only when it leaves no number
below ``B (k + 1 - L)`` behind: 0 is strict order, L lets a slow trajectory be overtaken for L
batches and no longer. (A run that goes on with another B counts from what is settled so far, which
stands for ``B k``.)

    admit ──▶ being written ──▶ offer ──▶ ready ──▶ take ──▶ taken ──▶ release: trained
                   ▲                        │                  │
                   └─ too stale ◀───────────┘                  │
                   └─ its body was lost ◀──────────────────────┘  put_back: the others are ready again

Example: B = 2, s = 1, L = 0. Numbers 0 to 3 hold the four slots. 1, 2 and 3 are ready, 0 is still
being written: no batch is full, since 0 would be left behind. Once 0 is offered, [0, 1] is taken; 4
and 5 are admitted when the weights made of it are published.

Bound: trajectory n is consumed by batch ``floor(n / B) + L`` at the latest, when the learner is at
that version. It was admitted when fewer than ``B (1 + s - L)`` numbers up to n were unpublished, so
at version ``floor(n / B) + L - s`` at the earliest. Its staleness is at most s. A number that is
dropped leaves its slot to the next one; those behind it move up, so n counts numbers that were not
dropped. Slots alone do not bound staleness: with an unbounded take order one slow trajectory can be
overtaken for ever.
"""

import asyncio
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field

from eopd.ledger import Watermark
from eopd.types import LossReason, ScoredTrajectory, Stored


@dataclass(slots=True)
class _Offer:
    """``fate`` is None once it is trained, else why it is to be sampled again."""

    stored: Stored[ScoredTrajectory]
    fate: asyncio.Future[LossReason | None]


@dataclass(frozen=True, slots=True)
class Taken:
    """One consumed trajectory and its issue number."""

    issue: int
    stored: Stored[ScoredTrajectory]


@dataclass(slots=True)
class Buffer:
    """Between scoring and training. ``settled`` and ``dropped`` are the ledger's: numbers that will
    not come any more, and those of them that no batch has had.

    An offer costs the same however many are ready: the learner is woken when a batch is full, not
    to look for one.
    """

    batch: int
    max_staleness: int
    lookahead: int
    settled: Watermark = field(default_factory=Watermark)
    dropped: set[int] = field(default_factory=set)
    num_in_flight: int = 0
    closed: bool = False
    _ready: dict[int, _Offer] = field(init=False, default_factory=dict)
    # the oldest that wrote in it
    _ready_by_version: dict[int, set[int]] = field(init=False, default_factory=dict)
    _taken: dict[int, _Offer] = field(init=False, default_factory=dict)
    # of those that were dropped, at least all above the floor
    _dropped_ahead: set[int] = field(init=False)
    # nothing below is missing: all is settled, taken or ready
    _next_missing: int = field(init=False)
    _oldest_allowed: int = field(init=False, default=0)
    _slot_freed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _take_may_go_on: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._next_missing = self.settled.floor
        self._dropped_ahead = set(self.dropped)

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
        """The lowest issue number that is neither settled, nor taken, nor ready."""
        places = (self._ready, self._taken, self.settled)
        while any(self._next_missing in place for place in places):
            self._next_missing += 1

        return self._next_missing

    async def admit(self) -> None:
        """Wait for a free slot and hold it."""
        while self.num_in_flight >= self.num_slots:
            self._slot_freed.clear()
            await self._slot_freed.wait()

        self.num_in_flight += 1

    async def offer(self, issue: int, stored: Stored[ScoredTrajectory]) -> LossReason | None:
        """Hand in a scored trajectory and wait for its fate.

        Returns:
            None when a batch has trained it; else why it is lost: the slot is still held, sample it
            again.
        """
        version = stored.header.oldest_version
        if version < self._oldest_allowed:
            return LossReason.TOO_STALE

        offer = _Offer(stored, asyncio.get_running_loop().create_future())
        self._put(issue, offer)
        self._wake_learner()

        return await offer.fate

    async def take(self, version: int) -> list[Taken]:
        """Wait for a full batch at learner version ``version``; too stale ones are turned away
        first.

        Returns:
            A full batch, or nothing once the buffer is closed.
        """
        self._turn_away_older_than(version - self.max_staleness)
        while not self.closed:
            if self._is_full():
                return [self._take(issue) for issue in self._lowest()]

            self._take_may_go_on.clear()
            await self._take_may_go_on.wait()

        return []

    def put_back(self, lost: Collection[int]) -> None:
        """The batch that was taken is not trained: those in ``lost`` are gone, the others are
        ready again.
        """
        for issue, offer in self._taken.items():
            if issue in lost:
                offer.fate.set_result(LossReason.BODY_LOST)
                self._next_missing = min(self._next_missing, issue)
            else:
                self._put(issue, offer)

        self._taken = {}

    def skip(self, issue: int) -> None:
        """A number was dropped: it may have been all that a full batch waited for."""
        self._dropped_ahead.add(issue)
        self._wake_learner()

    async def close(self) -> None:
        """Give out no further batch; whoever waits for one gets nothing."""
        self.closed = True
        self._take_may_go_on.set()

    def release(self) -> None:
        """Free the slots of the batch that was taken, once it is settled and the weights it
        made are published.
        """
        self.num_in_flight -= len(self._taken)
        for offer in self._taken.values():
            offer.fate.set_result(None)

        self._taken = {}
        self._slot_freed.set()

    def _is_full(self) -> bool:
        """Whether a batch is ready that leaves nothing overdue behind."""
        if len(self._ready) < self.batch:
            return False

        missing = self.next_missing
        self._dropped_ahead = {
            issue for issue in self._dropped_ahead if issue >= self.settled.floor
        }
        dropped_later = sum(issue > missing for issue in self._dropped_ahead)

        return missing >= len(self.settled) - dropped_later + self.batch * (1 - self.lookahead)

    def _wake_learner(self) -> None:
        if self._is_full():
            self._take_may_go_on.set()

    def _lowest(self) -> list[int]:
        # from the floor on, each has a slot or is settled
        admitted = self.num_slots + len(self.settled.ahead)
        numbers = range(self.settled.floor, self.settled.floor + admitted)
        return list(itertools.islice(filter(self._ready.__contains__, numbers), self.batch))

    def _take(self, issue: int) -> Taken:
        offer = self._withdraw(issue)
        self._taken[issue] = offer
        return Taken(issue, offer.stored)

    def _turn_away_older_than(self, oldest_allowed: int) -> None:
        self._oldest_allowed = oldest_allowed
        for version in [version for version in self._ready_by_version if version < oldest_allowed]:
            for issue in list(self._ready_by_version[version]):
                self._withdraw(issue).fate.set_result(LossReason.TOO_STALE)
                self._next_missing = min(self._next_missing, issue)

    def _put(self, issue: int, offer: _Offer) -> None:
        self._ready[issue] = offer
        self._ready_by_version.setdefault(offer.stored.header.oldest_version, set()).add(issue)

    def _withdraw(self, issue: int) -> _Offer:
        offer = self._ready.pop(issue)
        version = offer.stored.header.oldest_version
        self._ready_by_version[version].remove(issue)
        if not self._ready_by_version[version]:
            del self._ready_by_version[version]

        return offer
