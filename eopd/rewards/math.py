"""The grader ``math`` compares final answers as mathematics, with the math-verify library.

The library runs in a process of its own, since a short answer can keep sympy busy for hours.
"""

from typing import Final

from eopd.rewards.final_answer import as_latex, final_answer
from eopd.rewards.spelling import are_words_of_the_same_letters, stand_side_by_side
from eopd.rewards.verdict import Grader, Verdict, best, each
from eopd.types import Reference

JUDGE: Final = "eopd.rewards.equality:judge"


def grade_math(judge: Grader, response: str, reference: Reference) -> Verdict:
    r"""Judges whether the final answers of response and reference are equal as mathematics
    (math-verify's ``verify``). ``judge`` is the grader ``JUDGE``, asked once for each accepted
    answer.

    The final answer is the last box or a last line ``#### ...``; a reference without one is an
    answer as a whole. For a response without one the verdict is ``NO_ANSWER``: in free text
    math-verify 0.9 reads ``3\sqrt{13}`` as 3. Two expressions that it fails to compare are
    ``WRONG``, as it decides itself. Two numbers side by side (``12 34``) are not read.
    """
    answer = as_latex(final_answer(response) or "")
    if not answer:
        return Verdict.NO_ANSWER

    return best(_compare(judge, answer, accepted) for accepted in each(reference))


def _compare(judge: Grader, answer: str, accepted: str) -> Verdict:
    expected = final_answer(accepted)
    expected = as_latex(accepted if expected is None else expected)
    if stand_side_by_side(expected):
        return Verdict.ERROR

    if stand_side_by_side(answer):
        return Verdict.NO_ANSWER

    if are_words_of_the_same_letters(answer, expected):
        return Verdict.WRONG

    return judge(answer, expected)
