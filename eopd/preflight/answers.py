"""A grader needs an accepted answer in every row, and one that it can read."""

from collections.abc import Sequence
from typing import cast

from eopd.config import ConfigError
from eopd.config.base import OWN_GRADERS, GraderName
from eopd.prompts import PromptSet, list_places
from eopd.rewards.graders import open_grader, try_grader
from eopd.rewards.verdict import Verdict
from eopd.types import PromptSample, Reference


def require_answers(data: PromptSet, grader: GraderName, key: str) -> None:
    """Checks that every prompt has an accepted answer, and that the grader can read it: else every
    response would be wrong. A user's function, which ``key`` of the config names, is tried with the
    first one alone.

    Raises:
        ConfigError: names rows that have none, or one that the grader cannot read, or says what is
            wrong with the function.
    """
    if unanswered := [prompt for prompt in data.prompts if prompt.reference_answer is None]:
        raise ConfigError(
            f"{_where(data, unanswered)}: has no `answer`, so that nothing can be graded; "
            "write an accepted answer (text, a number, or a list of these) into every row"
        )

    if grader not in OWN_GRADERS:
        return try_grader(key, grader, _answer(data.prompts[0]))

    with open_grader(grader, key=key) as grade:
        unreadable = [
            prompt
            for prompt in data.prompts
            if grade(r"\boxed{0}", _answer(prompt)) is Verdict.ERROR
        ]

    if unreadable:
        raise ConfigError(
            f"{_where(data, unreadable)}: answer: the grader {grader} can read nothing in "
            f"it: {unreadable[0].reference_answer!r}; write the final answer alone, in "
            f"\\boxed{{}}, or behind ####"
        )


def _answer(prompt: PromptSample) -> Reference:
    return cast(Reference, prompt.reference_answer)


def _where(data: PromptSet, prompts: Sequence[PromptSample]) -> str:
    return list_places([data.places[prompt.prompt_id] for prompt in prompts])
