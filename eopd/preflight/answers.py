"""A grader needs an accepted answer in every row, and one that it can read."""

from collections.abc import Sequence

from eopd.config import ConfigError
from eopd.config.base import OWN_GRADERS, GraderName
from eopd.prompts import PromptSet, list_places
from eopd.rewards.graders import open_grader, try_grader
from eopd.rewards.verdict import Verdict
from eopd.types import PromptSample


def require_answers(data: PromptSet) -> None:
    """Checks that every prompt has an accepted answer.

    Raises:
        ConfigError: names rows without one.
    """
    if unanswered := [prompt for prompt in data.prompts if prompt.reference_answer is None]:
        raise ConfigError(
            f"{_where(data, unanswered)}: has no `answer`, so that nothing can be graded; "
            "write an accepted answer (text, a number, or a list of these) into every row"
        )


def require_readable_answers(data: PromptSet, grader: GraderName) -> None:
    """Checks that the grader can read every accepted answer: else every response would be wrong. A
    user's function is tried with the first one alone.

    Raises:
        ConfigError: names rows whose answer it cannot read, or what is wrong with the function.
    """
    if grader not in OWN_GRADERS:
        answers = [prompt.reference_answer or "" for prompt in data.prompts[:1]]
        return try_grader("grader", grader, "made up", answers[0])

    with open_grader(grader) as grade:
        unreadable = [
            prompt
            for prompt in data.prompts
            if prompt.reference_answer is not None
            and grade(r"\boxed{0}", prompt.reference_answer) is Verdict.ERROR
        ]

    if unreadable:
        raise ConfigError(
            f"{_where(data, unreadable)}: answer: the grader {grader} can read nothing in "
            f"it: {unreadable[0].reference_answer!r}; write the final answer alone, in "
            f"\\boxed{{}}, or behind ####"
        )


def _where(data: PromptSet, prompts: Sequence[PromptSample]) -> str:
    return list_places([data.places[prompt.prompt_id] for prompt in prompts])
