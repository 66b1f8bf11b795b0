"""Two answers are compared as mathematics by math-verify: what the child of the grader ``math``
runs.

math-verify's own time-outs raise from a Python handler of SIGALRM: they work in the main thread
only, and not before a long C call has returned. Here they are off, and the process has a limit.
"""

import logging

from math_verify import LatexExtractionConfig, parse, verify

from eopd.rewards.final_answer import is_prose

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0)]

logging.disable()  # math-verify warns that its time-outs are off


def judge(answer: str, reference: str) -> bool | None:
    """Returns whether two answers, both as LaTeX, are equal; None where the first one is none.

    Raises:
        ValueError: the reference cannot be read.
    """
    expected, given = _expressions(reference), _expressions(answer)
    # math-verify 0.9 reads words as products of letters
    if not expected or is_prose(reference):
        raise ValueError(f"{reference} cannot be read")

    return verify(expected, given, timeout_seconds=None) if given else None


def _expressions(answer: str) -> list[object]:
    return list(parse(f"\\boxed{{{answer}}}", _EXTRACTION, parsing_timeout=None))
