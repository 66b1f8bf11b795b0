"""Graders have names: ``exact`` compares text, ``math`` compares mathematics."""

import contextlib
from collections.abc import Iterator
from typing import get_args

from eopd.config.loss import GraderName
from eopd.rewards.exact import grade_exact
from eopd.rewards.math import MathProcess
from eopd.rewards.verdict import Grader


@contextlib.contextmanager
def open_grader(name: GraderName, *, time_limit_s: float = 10.0) -> Iterator[Grader]:
    """Opens the grader called ``name``; on exit its process, if it has one, has ended.

    Args:
        name: ``exact`` or ``math``.
        time_limit_s: CPU time that one ``math`` judgement may take before it is a ``TIMEOUT``. A
            busy machine changes no verdict, since waiting is not counted.

    Raises:
        ValueError: there is no such grader.
    """
    if name == "exact":
        yield grade_exact
    elif name == "math":
        process = MathProcess(time_limit_s)
        try:
            yield process.grade
        finally:
            process.close()
    else:
        raise ValueError(f"grader {name!r}: must be one of {', '.join(get_args(GraderName))}")
