"""What a grader says of a response: one verdict, of one or several accepted answers.

Every verdict but ``CORRECT`` scores 0, and each is counted by its own name, so that a benchmark
cannot hide answers that were never judged among wrong ones.
"""

from collections.abc import Callable, Iterable
from enum import StrEnum

from eopd.types import Reference


class Verdict(StrEnum):
    """What a grader says of a response; a metric label, so the set stays small."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # the response holds none that the grader can read
    TIMEOUT = "timeout"
    ERROR = "error"  # the grader failed, or cannot read the reference


Grader = Callable[[str, Reference], Verdict]  # (response, accepted answers); one call at a time


def each(reference: Reference) -> tuple[str, ...]:
    """The accepted answers of a reference, one or more."""
    return (reference,) if isinstance(reference, str) else reference


def best(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict over several accepted answers: the first of these that any of them led to."""
    found = list(verdicts)
    order = (Verdict.CORRECT, Verdict.NO_ANSWER, Verdict.TIMEOUT, Verdict.WRONG, Verdict.ERROR)
    return next(verdict for verdict in order if verdict in found)
