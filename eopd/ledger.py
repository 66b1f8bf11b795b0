"""Which trajectories are issued and trained: exactly once, through crash and resume.

Trajectories are known by *issue number*: number i is a pure function of the seed (``prompts.PromptOrder``), so the
ledger's whole memory is "everything below ``floor`` is trained, and these few above it". Numbers that were issued but
never trained are issued again after a resume.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from eopd.types import LossReason


@dataclass(slots=True)
class Ledger:
    """Issues numbers in order and remembers what was trained; ``lost`` counts failures by reason."""

    floor: int = 0
    trained_ahead: set[int] = field(default_factory=set)
    lost: Counter[LossReason] = field(default_factory=Counter)
    _next: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._next = self.floor

    def issue(self) -> int:
        """The next number that is neither trained nor issued."""
        while self._next in self.trained_ahead:
            self._next += 1
        self._next += 1
        return self._next - 1

    def train(self, issues: Iterable[int]) -> None:
        """Record a consumed batch.

        Raises:
            ValueError: a number was already trained, or never issued.
        """
        for issue in issues:
            if issue < self.floor or issue in self.trained_ahead or issue >= self._next:
                raise ValueError(f"trajectory {issue} was trained twice or never issued")
            self.trained_ahead.add(issue)
        while self.floor in self.trained_ahead:
            self.trained_ahead.remove(self.floor)
            self.floor += 1

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps, as JSON."""
        return {"floor": self.floor, "trained_ahead": sorted(self.trained_ahead), "lost": dict(self.lost)}

    @classmethod
    def restore(cls, floor: int, trained_ahead: Sequence[int], lost: Mapping[str, int]) -> Self:
        """Continue from a checkpoint: everything not trained is issued (again)."""
        return cls(floor, set(trained_ahead), Counter({LossReason(reason): count for reason, count in lost.items()}))
