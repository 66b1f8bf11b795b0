"""Which trajectories are issued, and what becomes of each: trained or dropped, exactly once,
through crash and resume.

Trajectories are known by *issue number*: number i is a pure function of the seed
(``prompts.PromptOrder``), so the ledger's whole memory is a watermark: "everything below ``floor``
is settled, and these few ``ahead`` of it". Numbers that were issued and never settled are issued
again after a resume.

Example: 0, 1 and 3 were trained and 2 was dropped, since no teacher could score it.

    ledger.settled   floor 4, nothing ahead
    ledger.dropped   {2}
    ledger.issue()   4
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from eopd.types import LossReason


@dataclass(slots=True)
class Watermark:
    """A set of numbers: all below ``floor``, and those ``ahead`` of it."""

    floor: int = 0
    ahead: set[int] = field(default_factory=set)

    def __contains__(self, number: int) -> bool:
        return number < self.floor or number in self.ahead

    def __len__(self) -> int:
        return self.floor + len(self.ahead)

    def add(self, number: int) -> None:
        """Put in one more, and raise the floor as far as it goes."""
        self.ahead.add(number)
        while self.floor in self.ahead:
            self.ahead.remove(self.floor)
            self.floor += 1


@dataclass(slots=True)
class Ledger:
    """Issues numbers in order and remembers what was settled; ``lost`` counts failed attempts
    by reason.
    """

    settled: Watermark = field(default_factory=Watermark)
    dropped: set[int] = field(default_factory=set)
    lost: Counter[LossReason] = field(default_factory=Counter)
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.settled.floor

    def issue(self) -> int:
        """The next number that is neither settled nor issued."""
        while self._next in self.settled:
            self._next += 1

        self._next += 1
        return self._next - 1

    def train(self, issues: Iterable[int]) -> None:
        """Record a consumed batch.

        Raises:
            ValueError: a number was settled before, or never issued.
        """
        for issue in issues:
            self._settle(issue)

    def drop(self, issue: int) -> None:
        """Record that a number will never be trained.

        Raises:
            ValueError: it was settled before, or never issued.
        """
        self._settle(issue)
        self.dropped.add(issue)

    def forgo(self, issues: Iterable[int]) -> None:
        """Drop what an earlier life of the run has dropped after the checkpoint that this one
        goes on from.
        """
        for issue in issues:
            if issue not in self.settled:
                self.settled.add(issue)
                self.dropped.add(issue)

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps, as JSON."""
        return {
            "floor": self.settled.floor,
            "trained_ahead": sorted(self.settled.ahead - self.dropped),
            "lost": dict(self.lost),
            "dropped": sorted(self.dropped),
        }

    @classmethod
    def restore(
        cls,
        floor: int,
        trained_ahead: Sequence[int],
        lost: Mapping[str, int],
        dropped: Sequence[int] = (),
    ) -> Self:
        """Continue from a checkpoint: everything not settled is issued (again)."""
        settled = Watermark(
            floor, {*trained_ahead, *(issue for issue in dropped if issue >= floor)}
        )
        return cls(
            settled,
            set(dropped),
            Counter({LossReason(reason): count for reason, count in lost.items()}),
        )

    def _settle(self, issue: int) -> None:
        if issue in self.settled or issue >= self._next:
            raise ValueError(f"trajectory {issue} was settled twice or never issued")

        self.settled.add(issue)
