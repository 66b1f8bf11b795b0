"""The ledger issues trajectories and records what becomes of each: it is trained or dropped, exactly
once, through crash and resume. A trajectory that is either is *settled*.

Trajectories are known by *issue number*: number i is a pure function of the seed
(``prompts.PromptOrder``), so the ledger's whole memory is a watermark: all numbers below ``floor``
are settled, and the few that are ``ahead`` of it. Numbers that were issued and never settled are
issued again after a resume.

Example: a batch of 0, 1 and 3 is trained while 2 is still being generated; then 2 is dropped.

    >>> ledger = Ledger()
    >>> [ledger.issue() for _ in range(5)]
    [0, 1, 2, 3, 4]
    >>> ledger.train([0, 1, 3])
    >>> ledger.settled
    Watermark(floor=2, ahead={3})
    >>> ledger.drop(2)
    >>> ledger.settled, ledger.dropped
    (Watermark(floor=4, ahead=set()), {2})

Number 4 was issued and not settled, so a run that resumes from here issues it again:

    >>> Ledger.restore(**ledger.state()).issue()
    4
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from eopd.types import LostReason


@dataclass(slots=True)
class Watermark:
    """A watermark is a set of numbers: all below ``floor``, and those ``ahead`` of it."""

    floor: int = 0
    ahead: set[int] = field(default_factory=set)

    def __contains__(self, number: int) -> bool:
        return number < self.floor or number in self.ahead

    def __len__(self) -> int:
        return self.floor + len(self.ahead)

    def add(self, number: int) -> None:
        """Adds a number, and raises the floor to the first number that is missing."""
        self.ahead.add(number)
        while self.floor in self.ahead:
            self.ahead.remove(self.floor)
            self.floor += 1


@dataclass(slots=True)
class Ledger:
    """A ledger issues numbers in order and records those that are settled; ``lost`` counts failed
    attempts by reason.

    Of the numbers that a filter dropped, which may be many, it knows how many there are, and those
    ``filtered_ahead`` of the floor when it last looked.
    """

    settled: Watermark = field(default_factory=Watermark)
    dropped: set[int] = field(default_factory=set)
    lost: Counter[LostReason] = field(default_factory=Counter)
    num_filtered: int = 0
    filtered_ahead: set[int] = field(default_factory=set)
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.settled.floor

    def issue(self) -> int:
        """Returns the next number that is neither settled nor issued."""
        while self._next in self.settled:
            self._next += 1

        self._next += 1
        return self._next - 1

    def train(self, issues: Iterable[int]) -> None:
        """Records the numbers of a batch that was trained.

        Raises:
            ValueError: a number was settled before, or never issued.
        """
        for issue in issues:
            self._settle(issue)

        self.filtered_ahead &= self.settled.ahead

    def drop(self, issue: int) -> None:
        """Records that a number will never be trained.

        Raises:
            ValueError: it was settled before, or never issued.
        """
        self._settle(issue)
        self.dropped.add(issue)

    def filter(self, issue: int) -> None:
        """Records that a number will never be trained, since the filter of the run dropped it.

        Raises:
            ValueError: it was settled before, or never issued.
        """
        self._settle(issue)
        self._count_filtered(issue)

    def drop_again(self, issues: Iterable[int], filtered: Iterable[int] = ()) -> None:
        """Drops the numbers that the run dropped or filtered before it was interrupted: a checkpoint
        from before that does not know of them.
        """
        for issue in issues:
            if issue not in self.settled:
                self.settled.add(issue)
                self.dropped.add(issue)

        for issue in filtered:
            if issue not in self.settled:
                self.settled.add(issue)
                self._count_filtered(issue)

    def state(self) -> dict[str, object]:
        """Returns what a checkpoint keeps of the ledger, as JSON."""
        return {
            "floor": self.settled.floor,
            "trained_ahead": sorted(self.settled.ahead - self.dropped - self.filtered_ahead),
            "lost": dict(self.lost),
            "dropped": sorted(self.dropped),
            "num_filtered": self.num_filtered,
            "filtered_ahead": sorted(self.filtered_ahead & self.settled.ahead),
        }

    @classmethod
    def restore(
        cls,
        floor: int,
        trained_ahead: Sequence[int],
        lost: Mapping[str, int],
        dropped: Sequence[int] = (),
        num_filtered: int = 0,
        filtered_ahead: Sequence[int] = (),
    ) -> Self:
        """Returns the ledger whose ``state`` a checkpoint kept: what is not settled is issued again."""
        dropped_ahead = {issue for issue in dropped if issue >= floor}
        return cls(
            settled=Watermark(floor, dropped_ahead.union(trained_ahead, filtered_ahead)),
            dropped=set(dropped),
            lost=Counter({LostReason(reason): count for reason, count in lost.items()}),
            num_filtered=num_filtered,
            filtered_ahead=set(filtered_ahead),
        )

    def _count_filtered(self, issue: int) -> None:
        self.num_filtered += 1
        self.filtered_ahead.add(issue)

    def _settle(self, issue: int) -> None:
        if issue in self.settled or issue >= self._next:
            raise ValueError(f"trajectory {issue} was settled twice or never issued")

        self.settled.add(issue)
