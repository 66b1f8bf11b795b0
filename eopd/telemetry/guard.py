"""The guard finds the collapse of a student in the rows of its training.

A window is ten steps in a row. The newest window is compared with the best of those that ended
before it began: the one in which most responses ended by themselves. The student has collapsed when

* at most half as many responses end by themselves, the others being cut by the length limit;
* no step of the newest window has as many of these as any step of the best one;
* and every step of the newest window repeats more than any step of the best one.

It has recovered once the newest window has, on average, as many as the worst step of the best one.

The rule is silent on noise, whatever its distribution: of twenty values in random order the lower
ten are the newest ten once in 184,756 times, and here that must hold for two metrics at a time.
The half keeps it silent on responses that merely grow. A teacher's entropy and the gate fall in a
collapse into repetition, but also while a sound student learns, and not where student and teacher
end with different tokens: they are told, and decide nothing.

    end-token rate   best 0.9 0.8 0.9 ... 0.7      newest 0.3 0.1 ... 0.0: below 0.7, half of it
    repetition       best 0.0 0.1 0.0 ... 0.1      newest 0.2 0.4 ... 0.6: above 0.1
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Self

WINDOW: Final = 10
HALF: Final = 0.5

_ENDED: Final = "eopd_end_token_ratio"
_REPEATED: Final = "eopd_repetition_ratio"
_ENTROPY: Final = "eopd_teacher_entropy_nats"
_GATE: Final = "eopd_gate_ratio"
_READ: Final = ("eopd_step", _ENDED, _REPEATED, _ENTROPY, _GATE)

_Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Window:
    """Some steps in a row, as the numbers of their rows that the guard reads."""

    rows: Sequence[_Numbers]

    @property
    def first_step(self) -> int:
        """Returns the first step."""
        return int(self.rows[0]["eopd_step"])

    @property
    def last_step(self) -> int:
        """Returns the last step."""
        return int(self.rows[-1]["eopd_step"])

    def values(self, name: str) -> list[float]:
        """Returns a metric of every step."""
        return [row[name] for row in self.rows]

    def mean(self, name: str) -> float:
        """Returns the mean of a metric."""
        return fmean(self.values(name))


@dataclass(frozen=True, slots=True)
class Collapse:
    """A collapse: the best window, and the one in which it showed."""

    best: Window
    newest: Window

    def __str__(self) -> str:
        best, newest = self.best, self.newest

        def change(name: str, form: str) -> str:
            return f"{best.mean(name):{form}} -> {newest.mean(name):{form}}"

        return (
            f"the student collapses: over steps {newest.first_step} to {newest.last_step}, "
            f"compared with steps {best.first_step} to {best.last_step}, fewer responses end by "
            f"themselves ({change(_ENDED, '.0%')}) and they repeat more "
            f"({change(_REPEATED, '.1%')}); teacher entropy {change(_ENTROPY, '.2f')} nats, gate "
            f"open {change(_GATE, '.0%')}"
        )


class Guard:
    """Reads the rows of a run in their order. ``collapse`` is the one under way, or None."""

    def __init__(self) -> None:
        self.collapse: Collapse | None = None
        self._rows: deque[_Numbers] = deque(maxlen=2 * WINDOW)
        self._best: Window | None = None

    @classmethod
    def replay(cls, rows: Iterable[Mapping[str, object]]) -> Self:
        """Returns the guard that has read these rows."""
        guard = cls()
        for row in rows:
            guard.take(row)

        return guard

    def take(self, row: Mapping[str, object]) -> bool:
        """Reads the row of a step; returns whether a collapse has begun with it. A row that lacks
        one of the numbers is passed over.
        """
        numbers = {name: row[name] for name in _READ if isinstance(row.get(name), int | float)}
        if len(numbers) < len(_READ):
            return False

        self._rows.append(numbers)  # type: ignore[arg-type]
        if len(self._rows) < 2 * WINDOW:
            return False

        rows = list(self._rows)
        before, newest = Window(rows[:WINDOW]), Window(rows[WINDOW:])
        if self._best is None or before.mean(_ENDED) >= self._best.mean(_ENDED):
            self._best = before

        if self.collapse is not None:
            if newest.mean(_ENDED) >= min(self._best.values(_ENDED)):
                self.collapse = None

            return False

        if has_collapsed(self._best, newest):
            self.collapse = Collapse(self._best, newest)

        return self.collapse is not None


def has_collapsed(best: Window, newest: Window) -> bool:
    """Tells whether the student has collapsed from one window to a later one."""
    return (
        newest.mean(_ENDED) <= HALF * best.mean(_ENDED)
        and max(newest.values(_ENDED)) < min(best.values(_ENDED))
        and min(newest.values(_REPEATED)) > max(best.values(_REPEATED))
    )
