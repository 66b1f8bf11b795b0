"""The grader ``exact``: final answers are compared as text."""

from eopd.rewards.final_answer import as_text, final_answer, last_line
from eopd.rewards.verdict import Verdict, best, each
from eopd.types import Reference


def grade_exact(response: str, reference: Reference) -> Verdict:
    r"""Final answers are the same text.

    Up to case, spacing, enclosing ``$`` or emphasis, closing full stops, the width of characters,
    the script of digits, and the character that stands for minus. The final answer is the last box
    or a last line ``#### ...``, or else the last line that is not empty; of a reference too.
    """
    answer = as_text(_last_said(response))
    return best(_compared(answer, as_text(_last_said(accepted))) for accepted in each(reference))


def _last_said(text: str) -> str:
    found = final_answer(text)
    return last_line(text) if found is None else found


def _compared(answer: str, accepted: str) -> Verdict:
    if not accepted:
        return Verdict.ERROR

    if not answer:
        return Verdict.NO_ANSWER

    return Verdict.CORRECT if answer == accepted else Verdict.WRONG
