"""The buffer bounds staleness by construction, with admission slots and the order of taking.

A trajectory holds one of ``B (1 + s - L)`` slots from its admission until the batch that consumed
it is *published* (B batch size, s ``max_staleness``, L ``lookahead``). Batch number k takes the B
ready trajectories with the lowest issue numbers, and may be taken only when it leaves no number
below ``B (k + 1 - L)`` behind: L = 0 is strict order, and L > 0 lets a slow trajectory be overtaken
for L batches and no longer. (A run that continues with another B counts from the numbers settled so
far, in place of ``B k``.)

A batch may be taken in parts, while the rest of it is still being written. What is ready among the
B lowest numbers that are not settled is of the next batch, whatever comes: it may go ahead.

    admit ──▶ in flight ──▶ offer ──▶ ready ──▶ take ──▶ taken ──▶ settle ──▶ trained ──▶ release
                  ▲                     │                  │
                  └─ too stale ◀────────┘                  │
                  └─ its body was lost ◀───────────────────┘  put_back: the others are ready again

Between ``settle`` and ``release`` the weights are on their way to the engines; parts of the next
batch may be taken meanwhile.

Example: B = 1, s = 1, L = 0, which makes two slots, and the issues 0, 1 and 2.

    event                  in flight   ready   taken   trained   who waits
    0 and 1 are admitted   0 1                                   2 for a slot, the learner for 0
    1 is scored            0           1                         the same: batch 0 may not leave 0 behind
    0 is scored                        0 1                       2 for a slot
    take(version=0)                    1       0                 2 for a slot
    settle, version 1                  1               0         2 for a slot
    release                2           1                         2 was admitted, and may be trained at version 2
    take(version=1)        2                   1

Bound: trajectory n is consumed by batch ``floor(n / B) + L`` at the latest, when the learner is at
that version. It was admitted when fewer than ``B (1 + s - L)`` numbers up to n were unpublished, so
at version ``floor(n / B) + L - s`` at the earliest. Its staleness is at most s. A number that is
dropped leaves its slot to the next one; those behind it move up, so n counts numbers that were not
dropped. Slots alone do not bound staleness: with an unbounded take order one slow trajectory can be
overtaken for ever.
"""

import asyncio
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from eopd.ledger import Watermark
from eopd.types import LostReason, ScoredTrajectory, Stored


@dataclass(slots=True)
class _Offer:
    """A scored trajectory. Its ``outcome`` is None once the weights made of it are published, else
    why it was lost.
    """

    stored: Stored[ScoredTrajectory]
    outcome: asyncio.Future[LostReason | None]

    def end(self, outcome: LostReason | None) -> None:
        """Tells whoever waits for it; nobody does any more where the run has failed meanwhile."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a batch by issue number, in order. ``completes`` the batch where it is the last, or
    the only one.
    """

    taken: Mapping[int, Stored[ScoredTrajectory]]
    completes: bool


@dataclass(slots=True)
class Buffer:
    """A buffer holds trajectories between scoring and training.

    ``settled`` is the ledger's: the numbers that were trained, dropped or filtered. ``dropped`` has
    those above its floor that were not trained, and perhaps some below. An offer costs the same
    however many are ready: the learner is woken only when a batch is full, or a part of it has
    ``part_tokens``. With None a batch is one part.
    """

    batch: int
    max_staleness: int
    lookahead: int
    part_tokens: int | None = None
    settled: Watermark = field(default_factory=Watermark)
    dropped: set[int] = field(default_factory=set)
    num_slots_held: int = 0
    closed: bool = False
    _ready: dict[int, _Offer] = field(init=False, default_factory=dict)
    _taken: dict[int, _Offer] = field(init=False, default_factory=dict)
    _trained: list[_Offer] = field(init=False, default_factory=list)  # and not yet published
    # all numbers below are settled, taken or ready
    _next_missing: int = field(init=False)
    # all numbers below are of the next batch, or settled; those of it that are ready; their tokens
    _next_batch_end: int = field(init=False, default=0)
    _next_batch: set[int] = field(init=False, default_factory=set)
    _next_batch_tokens: int = field(init=False, default=0)
    _oldest_allowed: int = field(init=False, default=0)
    _slot_freed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _take_may_go_on: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._next_missing = self.settled.floor
        self._look_at_next_batch()

    @property
    def num_slots(self) -> int:
        """Returns how many trajectories may be admitted and unpublished at a time."""
        return self.batch * (1 + self.max_staleness - self.lookahead)

    @property
    def num_ready(self) -> int:
        """Returns how many trajectories are scored, and not yet taken."""
        return len(self._ready)

    @property
    def num_in_flight(self) -> int:
        """Returns how many trajectories were admitted, and are not yet scored."""
        return self.num_slots_held - len(self._ready) - len(self._taken) - len(self._trained)

    @property
    def taken(self) -> dict[int, Stored[ScoredTrajectory]]:
        """Returns what the learner has of the batch, by issue number, in order."""
        return {issue: self._taken[issue].stored for issue in sorted(self._taken)}

    @property
    def num_taken(self) -> int:
        """Returns how many trajectories of the batch the learner has."""
        return len(self._taken)

    @property
    def next_missing(self) -> int:
        """Returns the lowest issue number that is neither settled, nor taken, nor ready."""
        places = (self._ready, self._taken, self.settled)
        while any(self._next_missing in place for place in places):
            self._next_missing += 1

        return self._next_missing

    async def admit(self) -> None:
        """Waits for a free slot and holds it."""
        while self.num_slots_held >= self.num_slots:
            self._slot_freed.clear()
            await self._slot_freed.wait()

        self.num_slots_held += 1

    async def offer(self, issue: int, stored: Stored[ScoredTrajectory]) -> LostReason | None:
        """Hands in a scored trajectory, and waits until it is trained or lost.

        Returns:
            None once the weights of its batch are published; else why it is lost. Its slot is still held then,
            for it to be sampled again.
        """
        version = stored.header.oldest_version
        if version < self._oldest_allowed:
            return LostReason.TOO_STALE

        offer = _Offer(stored, asyncio.get_running_loop().create_future())
        self._put(issue, offer)
        self._wake_learner()

        return await offer.outcome

    async def take(self, version: int, *, ahead: bool = False) -> Part | None:
        """Rejects what is too stale for learner version ``version``, then waits for the next part
        of a batch.

        Args:
            version: what the learner holds.
            ahead: whether this goes on only until the batch before is released; the part that
                completes a batch must wait for that.

        Returns:
            A part, or None once the buffer is closed, or the batch before is released.
        """
        self._reject_older_than(version - self.max_staleness)
        while not self.closed and (self._trained or not ahead):
            if self._is_full() and not ahead:
                rest = self._lowest(self.batch - len(self._taken))
                return Part({issue: self._take(issue) for issue in rest}, completes=True)

            if part := self._first_part(ahead):
                return Part({issue: self._take(issue) for issue in part}, completes=False)

            self._take_may_go_on.clear()
            await self._take_may_go_on.wait()

        return None

    def put_back(self, part: Part, lost: Collection[int]) -> None:
        """Takes back a part that was taken and not trained: the bodies of ``lost`` are lost, the
        other trajectories are ready again.
        """
        for issue in part.taken:
            offer = self._taken.pop(issue)
            if issue in lost:
                offer.end(LostReason.BODY_LOST)
                self._next_missing = min(self._next_missing, issue)
            else:
                self._put(issue, offer)

    def skip(self, issue: int) -> None:
        """Notes that a number was dropped, and gives out what waited only for it."""
        self.dropped.add(issue)
        if issue < self._next_batch_end:
            self._extend_next_batch()

        self._wake_learner()

    def close(self) -> None:
        """Gives out nothing any more: ``take`` returns None, also where it waits now."""
        self.closed = True
        self._take_may_go_on.set()

    def settle(self) -> None:
        """Begins the next batch; to be called once the ledger has the one that was taken, which keeps
        its slots.
        """
        self._trained += self._taken.values()
        self._taken = {}
        self.dropped = {issue for issue in self.dropped if issue >= self.settled.floor}
        self._look_at_next_batch()

    def release(self) -> None:
        """Frees the slots of the batch that was settled; to be called once the weights made of it are
        published.
        """
        self.num_slots_held -= len(self._trained)
        for offer in self._trained:
            offer.end(None)

        self._trained = []
        self._slot_freed.set()
        self._take_may_go_on.set()

    def _is_full(self) -> bool:
        """Tells whether the rest of a batch is ready, and leaves no overdue number behind."""
        if len(self._taken) + len(self._ready) < self.batch:
            return False

        missing = self.next_missing
        dropped_later = sum(issue > missing for issue in self.dropped)
        due = len(self.settled) - dropped_later + self.batch * (1 - self.lookahead)

        # the B lowest are a batch also where a run was continued with another B or L
        return missing >= min(due, self._next_batch_end)

    def _has_part(self) -> bool:
        """Tells whether enough of the next batch is ready to begin with."""
        return self.part_tokens is not None and self._next_batch_tokens >= self.part_tokens

    def _wake_learner(self) -> None:
        if self._is_full() or self._has_part():
            self._take_may_go_on.set()

    def _lowest(self, count: int) -> list[int]:
        """Returns the ``count`` lowest ready numbers, in order."""
        # each number from the floor on has a slot or is settled
        admitted = self.num_slots + len(self.settled.ahead)
        numbers = range(self.settled.floor, self.settled.floor + admitted)
        return list(itertools.islice(filter(self._ready.__contains__, numbers), count))

    def _first_part(self, ahead: bool) -> list[int]:
        """Returns ready numbers of the next batch, in order: at most as many as fill whole parts,
        so that no small remainder is trained by itself. ``ahead`` leaves one for later.
        """
        part: list[int] = []
        if not self._has_part():
            return part

        assert self.part_tokens is not None
        tokens = self._next_batch_tokens
        if ahead and len(self._taken) + len(self._next_batch) == self.batch:
            tokens -= self._ready[max(self._next_batch)].stored.header.num_tokens

        room = tokens // self.part_tokens * self.part_tokens

        for issue in sorted(self._next_batch):
            room -= self._ready[issue].stored.header.num_tokens
            if room < 0:
                break

            part.append(issue)

        return part

    def _look_at_next_batch(self) -> None:
        """Finds the end of the next batch, and the tokens of it that are ready."""
        missing = (n for n in itertools.count(self.settled.floor) if n not in self.settled)
        numbers = list(itertools.islice(missing, self.batch))
        self._next_batch_end = numbers[-1] + 1
        self._next_batch, self._next_batch_tokens = set(), 0
        for issue in filter(self._ready.__contains__, numbers):
            self._count_in(issue)

    def _take(self, issue: int) -> Stored[ScoredTrajectory]:
        self._taken[issue] = offer = self._withdraw(issue)
        return offer.stored

    def _reject_older_than(self, oldest_allowed: int) -> None:
        if oldest_allowed == self._oldest_allowed:
            return  # and none that is older was offered since

        self._oldest_allowed = oldest_allowed
        for issue, offer in list(self._ready.items()):
            if offer.stored.header.oldest_version < oldest_allowed:
                self._withdraw(issue).end(LostReason.TOO_STALE)
                self._next_missing = min(self._next_missing, issue)

    def _extend_next_batch(self) -> None:
        """Takes one number more into the next batch, in place of one that was dropped."""
        beyond = itertools.count(self._next_batch_end)
        number = next(issue for issue in beyond if issue not in self.settled)
        self._next_batch_end = number + 1
        if number in self._ready:
            self._count_in(number)

    def _count_in(self, issue: int) -> None:
        """Counts a ready trajectory to the next batch."""
        self._next_batch.add(issue)
        self._next_batch_tokens += self._ready[issue].stored.header.num_tokens

    def _put(self, issue: int, offer: _Offer) -> None:
        self._ready[issue] = offer
        if issue < self._next_batch_end:
            self._count_in(issue)

    def _withdraw(self, issue: int) -> _Offer:
        offer = self._ready.pop(issue)
        if issue in self._next_batch:
            self._next_batch.remove(issue)
            self._next_batch_tokens -= offer.stored.header.num_tokens

        return offer
