"""A grader gives a response one verdict, by one or several accepted answers.

Every verdict but ``CORRECT`` scores 0, and each is counted by its own name, so that a benchmark
cannot hide answers that were never judged among wrong ones.
"""

from collections.abc import Callable, Iterable
from enum import StrEnum

from eopd.types import Reference


class Verdict(StrEnum):
    """A verdict is a grader's judgement of a response. It is a metric label, so the set stays small."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # the response holds none that the grader can read
    TIMEOUT = "timeout"
    ERROR = "error"  # the grader failed, or cannot read the reference


Grader = Callable[[str, Reference], Verdict]  # (response, accepted answers); one call at a time


def each(reference: Reference) -> tuple[str, ...]:
    """Returns the accepted answers of a reference, one or more."""
    return (reference,) if isinstance(reference, str) else reference


def best(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the verdict over several accepted answers: the first in the order below that occurs."""
    order = (Verdict.CORRECT, Verdict.NO_ANSWER, Verdict.TIMEOUT, Verdict.WRONG, Verdict.ERROR)
    return min(verdicts, key=order.index)
