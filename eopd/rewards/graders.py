"""Graders have names: ``exact`` compares text, ``math`` compares mathematics, and any other one is
a function of the user, by its import path.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

from eopd.config import ConfigError
from eopd.config.base import GraderName
from eopd.plugins import GraderFunction
from eopd.rewards.exact import grade_exact
from eopd.rewards.math import JUDGE, grade_math
from eopd.rewards.process import CPU_LIMIT_S, Asked, Failed, FunctionProcess, Returned, ask_once
from eopd.rewards.verdict import Grader, Verdict
from eopd.types import Reference

# 1 and 0 are equal to True and False
_VERDICTS: Final[Mapping[object, Verdict]] = {
    True: Verdict.CORRECT,
    False: Verdict.WRONG,
    None: Verdict.NO_ANSWER,
}


@contextlib.contextmanager
def open_grader(
    name: GraderName, *, key: str = "grader", time_limit_s: float = CPU_LIMIT_S
) -> Iterator[Grader]:
    """Opens the grader called ``name``; on exit its process, if it has one, has ended.

    Args:
        name: ``exact``, ``math``, or ``package.module:name`` of a ``GraderFunction``.
        key: the key or the option that names it, for messages.
        time_limit_s: CPU time that one judgement of a process may take before it is a ``TIMEOUT``.
            A busy machine changes no verdict, since waiting is not counted.

    Raises:
        ConfigError: a function cannot be loaded, or its process cannot be started.
    """
    if name == "exact":
        yield grade_exact
        return

    asked = Asked(
        key=key,
        function=JUDGE if name == "math" else name,
        kind=GraderFunction,
        cpu_limit_s=time_limit_s,
    )
    with contextlib.closing(FunctionProcess(asked)) as process:

        def grade(response: str, reference: Reference) -> Verdict:
            return _verdict(process.ask(response, reference))

        if name == "math":  # it can be loaded, and starts when it is first asked
            yield partial(grade_math, grade)
        else:
            process.start()
            yield grade


def try_grader(key: str, function: str, reference: Reference) -> None:
    """Calls a user's grader, which ``key`` of the config names, once with a response that is made up.

    Raises:
        ConfigError: it cannot be loaded, fails, or gives something else than a verdict.
    """
    asked = Asked(key=key, function=function, kind=GraderFunction)
    said = ask_once(asked, "made up", reference)
    if isinstance(said, Failed):
        raise ConfigError(f"{key}: {said.cause}")

    if said.value not in _VERDICTS:
        raise ConfigError(f"{key}: {function}: must return True, False or None (is {said.value!r})")


def _verdict(said: Returned | Failed) -> Verdict:
    """Returns the verdict that a user's grader gave: ``ERROR`` where it gave none."""
    if isinstance(said, Failed):
        return Verdict.TIMEOUT if said.timed_out else Verdict.ERROR

    return _VERDICTS.get(said.value, Verdict.ERROR)
