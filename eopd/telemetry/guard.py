"""The guard finds the collapse of a student in the rows of its training.

A window is ten steps in a row. The newest window is compared with earlier ones, which ended before
it began. The student has collapsed when it stops to end, compared with the best window, the one in
which most responses ended by themselves:

* at most half as many responses end by themselves, the others being cut by the length limit;
* no step of the newest window has as many of these as any step of the best one;
* and every step of the newest window repeats more than any step of the best one.

Or it is torn apart, by too high a rate: it writes now this, now that, and is further from the
teacher than before it learned anything, which the first window shows:

* its reverse KL is on average at least twice that of the first window;
* and in every step above that of any step of the first one, and above 1 nat a token, since a student
  that begins close to its teacher may leave it a little, for a reward.

It has recovered once the newest window has, on average, as many responses that end as the worst step
of the best one, and no more reverse KL than the worst step of the first one.

Noise rarely looks like that, whatever its distribution: of twenty values in random order the lower
ten are the newest ten once in 184,756 times, and more than that must hold. In hundreds of thousands
of steps it may happen once, for the rule is asked after each. The half keeps it silent on responses
that merely grow. A teacher's entropy and the gate fall in a collapse into repetition, but also while
a sound student learns, and not in other collapses: they are told, and decide nothing.

    end-token rate   best 0.9 0.8 0.9 ... 0.7      newest 0.3 0.1 ... 0.0: below 0.7, half of it
    repetition       best 0.0 0.1 0.0 ... 0.1      newest 0.2 0.4 ... 0.6: above 0.1
    reverse KL       first 1.5 1.1 0.9 ... 0.3     newest 3.2 4.5 ... 5.5: above 1.5, twice as much
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Self

WINDOW: Final = 10
HALF: Final = 0.5
TWICE: Final = 2.0
FAR_NATS: Final = 1.0

_ENDED: Final = "eopd_end_token_ratio"
_REPEATED: Final = "eopd_repetition_ratio"
_REVERSE_KL: Final = "eopd_reverse_kl_nats"
_ENTROPY: Final = "eopd_teacher_entropy_nats"
_GATE: Final = "eopd_gate_ratio"
_READ: Final = ("eopd_step", _ENDED, _REPEATED, _REVERSE_KL, _ENTROPY, _GATE)

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

    def lies_above(self, other: "Window", name: str) -> bool:
        """Tells whether every step has more of a metric than any step of another window."""
        return min(self.values(name)) > max(other.values(name))


@dataclass(frozen=True, slots=True)
class Collapse:
    """A collapse: the window in which it showed, a sound one to compare it with, and what shows it."""

    best: Window
    newest: Window
    sign: str

    def __str__(self) -> str:
        best, newest = self.best, self.newest

        def change(name: str, form: str) -> str:
            return f"{best.mean(name):{form}} -> {newest.mean(name):{form}}"

        return (
            f"the student collapses: over steps {newest.first_step} to {newest.last_step}, "
            f"compared with steps {best.first_step} to {best.last_step}, {self.sign} (responses "
            f"that end {change(_ENDED, '.0%')}, repetition {change(_REPEATED, '.1%')}, reverse KL "
            f"{change(_REVERSE_KL, '.2f')} nats, teacher entropy {change(_ENTROPY, '.2f')} nats, "
            f"gate open {change(_GATE, '.0%')})"
        )


class Guard:
    """Reads the rows of a run in their order. ``collapse`` is the one under way, or None."""

    def __init__(self) -> None:
        self.collapse: Collapse | None = None
        self._rows: deque[_Numbers] = deque(maxlen=2 * WINDOW)
        self._first: Window | None = None
        self._best: Window | None = None  # in which most responses end
        self._nearest: Window | None = None  # to the teacher

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
        first = self._first = self._first or before
        if self._best is None or before.mean(_ENDED) >= self._best.mean(_ENDED):
            self._best = before

        if self._nearest is None or before.mean(_REVERSE_KL) <= self._nearest.mean(_REVERSE_KL):
            self._nearest = before

        if self.collapse is not None:
            if has_recovered(self._best, first, newest):
                self.collapse = None

            return False

        if stops_to_end(self._best, newest):
            sign = "fewer responses end by themselves, and they repeat more"
            self.collapse = Collapse(self._best, newest, sign)
        elif is_torn_apart(first, newest):
            sign = "it is further from the teacher than before it learned anything"
            self.collapse = Collapse(self._nearest, newest, sign)

        return self.collapse is not None


def stops_to_end(best: Window, newest: Window) -> bool:
    """Tells whether responses stop to end and begin to repeat, from one window to a later one."""
    return (
        newest.mean(_ENDED) <= HALF * best.mean(_ENDED)
        and best.lies_above(newest, _ENDED)
        and newest.lies_above(best, _REPEATED)
    )


def is_torn_apart(first: Window, newest: Window) -> bool:
    """Tells whether the student is much further from the teacher than in the first window."""
    return (
        newest.mean(_REVERSE_KL) >= TWICE * first.mean(_REVERSE_KL)
        and newest.lies_above(first, _REVERSE_KL)
        and min(newest.values(_REVERSE_KL)) > FAR_NATS
    )


def has_recovered(best: Window, first: Window, newest: Window) -> bool:
    """Tells whether the newest window is again as good as the worst step of each of the others."""
    return newest.mean(_ENDED) >= min(best.values(_ENDED)) and newest.mean(_REVERSE_KL) <= max(
        first.values(_REVERSE_KL)
    )
