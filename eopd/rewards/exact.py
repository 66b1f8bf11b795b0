"""The grader ``exact``: final answers are compared as text."""

from eopd.rewards.final_answer import as_text, final_answer, last_line
from eopd.rewards.verdict import Verdict, best, each
from eopd.types import Reference


def grade_exact(response: str, reference: Reference) -> Verdict:
    r"""Judges whether the final answers of response and reference are the same text.

    The same are texts that differ in case, spacing, enclosing ``$`` or emphasis, closing full stops,
    the width of characters, the script of digits, and the character that stands for minus. The
    final answer is the last box or a last line ``#### ...``, or else the last line that is not
    empty.
    """
    answer = as_text(_final_text(response))
    return best(_compared(answer, as_text(_final_text(accepted))) for accepted in each(reference))


def _final_text(text: str) -> str:
    answer = final_answer(text)
    return last_line(text) if answer is None else answer


def _compared(answer: str, accepted: str) -> Verdict:
    if not accepted:
        return Verdict.ERROR

    if not answer:
        return Verdict.NO_ANSWER

    return Verdict.CORRECT if answer == accepted else Verdict.WRONG
