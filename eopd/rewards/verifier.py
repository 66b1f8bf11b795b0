"""A verifier rewards sampled responses that are right; every rollout engine has one."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from eopd.config.loss import GraderName
from eopd.rewards.graders import open_grader
from eopd.rewards.verdict import Verdict
from eopd.tokenizer import load_tokenizer
from eopd.types import Trajectory


class Verifier:
    """A verifier decodes responses with the tokenizer of ``model`` and grades them, one at a time, off
    the event loop.
    """

    def __init__(self, grader: GraderName, model: Path) -> None:
        self._open = ExitStack()
        self._thread = self._open.enter_context(ThreadPoolExecutor(max_workers=1))
        self._grade = self._open.enter_context(open_grader(grader))
        self._tokenizer = load_tokenizer(model)

    async def reward(self, trajectory: Trajectory) -> float | None:
        """Returns 1 where the grader finds the response correct, else 0; None where the prompt has no
        reference answer.
        """
        reference = trajectory.prompt.reference_answer
        if reference is None:
            return None

        response = self._tokenizer.decode(trajectory.response_ids, skip_special_tokens=True)
        verdict = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._grade, response, reference
        )

        return 1.0 if verdict is Verdict.CORRECT else 0.0

    def close(self) -> None:
        """Ends the grader's process."""
        self._open.close()
