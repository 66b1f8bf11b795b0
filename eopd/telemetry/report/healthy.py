"""The ranges in which a sound run keeps its metrics, and whether a run keeps to them.

Each range stands in words in the catalogue (``Metric.healthy``); here it is once more as numbers,
for charts to draw and to judge by.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

_HYPHEN: Final = re.compile(r"(?<![\w.])-(?=\d)")  # of a number, and of no exponent


@dataclass(frozen=True, slots=True)
class Range:
    """A range of values, its ends included. It holds for runs whose config has ``when``, and nothing
    of ``unless``.
    """

    low: float = -math.inf
    high: float = math.inf
    when: Mapping[str, object] = field(default_factory=dict, hash=False)
    unless: Mapping[str, object] = field(default_factory=dict, hash=False)

    def holds(self, value: float) -> bool:
        """Returns whether a value lies within."""
        return self.low <= value <= self.high

    def is_for(self, config: Mapping[str, object]) -> bool:
        """Returns whether a run of this config is judged by it."""
        is_meant = all(config.get(key) == value for key, value in self.when.items())
        return is_meant and all(config.get(key) != value for key, value in self.unless.items())

    def words(self, percent: bool) -> str:
        """Returns the range as people say it."""
        low, high = number(self.low, percent), number(self.high, percent)
        if math.isinf(self.low):
            return f"at most {high}"

        return f"at least {low}" if math.isinf(self.high) else f"{low} to {high}"


_NO_FORWARD_KL: Final = {"loss.alpha": 0}  # the gate does nothing then
HEALTHY: Final[Mapping[str, Range]] = {
    "eopd_gate_ratio": Range(0.15, 0.2, {"loss.gate.kind": "hard"}, _NO_FORWARD_KL),
    "eopd_gate_uncertain_ratio": Range(high=0.1, unless=_NO_FORWARD_KL),
    "eopd_teacher_topk_mass_ratio": Range(low=0.9),
    "eopd_importance_capped_ratio": Range(high=0.05),
    "eopd_logprob_gap_nats": Range(high=0.05, when={"flow.max_staleness": 0}),
    "eopd_clipped_ratio": Range(high=0.2),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a metric that left its healthy range; ``is_breach`` where it is
    outside at the end. The end of a run under way is now.
    """

    text: str
    is_breach: bool


def judge(
    label: str,
    steps: Sequence[float],
    values: Sequence[float | None],
    healthy: Range,
    percent: bool,
) -> Verdict | None:
    """Judges a metric by the mean over the last tenth of its steps; returns None where it was
    never outside of its range.
    """
    finite = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    outside = [step for step, value in finite if not healthy.holds(value)]
    if not outside:
        return None

    last = [value for _, value in finite[-max(1, len(finite) // 10) :]]
    end = sum(last) / len(last)
    count = f"outside in {len(outside)} of {len(finite)} steps"
    if healthy.holds(end):
        where = f"back in the healthy range ({healthy.words(percent)})"
        return Verdict(f"{label}: {where} at the end; {count}, the last {outside[-1]}.", False)

    side = "below" if end < healthy.low else "above"
    place = f"{number(end, percent)} at step {finite[-1][0]}"
    words = f"{label}: {place}, {side} the healthy range ({healthy.words(percent)}); {count}."
    return Verdict(words, True)


def minus(text: str) -> str:
    """Returns numbers in words with the minus sign that the page has everywhere."""
    return _HYPHEN.sub("\u2212", text)


def number(value: float, percent: bool) -> str:
    """Returns a value as charts show it."""
    return minus(f"{100 * value:.3g} %" if percent else f"{value:.3g}")
