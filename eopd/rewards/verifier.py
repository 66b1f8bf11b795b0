"""A verifier rewards sampled responses; every rollout engine has one."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Final, cast

from eopd.config import ConfigError
from eopd.config.loss import Reward
from eopd.plugins import RewardFunction, Row
from eopd.rewards.graders import open_grader
from eopd.rewards.process import Asked, Failed, FunctionPool, Returned
from eopd.rewards.verdict import Verdict
from eopd.tokenizer import load_tokenizer
from eopd.types import Header, Reference, Trajectory

KEY = "loss.reverse_kl.reward.function"
LARGEST_REWARD: Final = 1e9  # times a weight of up to 1e6, its square is still a float32


class Verifier:
    """A verifier decodes responses with the tokenizer of ``model`` and rewards them, off the event
    loop.
    """

    def __init__(self, reward: Reward, model: Path) -> None:
        self._function = reward.function
        self._rewarder = _Grading(reward) if reward.is_ours else FunctionPool(asked_for(reward))
        self._tokenizer = load_tokenizer(model)

    async def reward(self, header: Header, trajectory: Trajectory) -> Header:
        """Returns the header with the reward of a response, or with why there is none.

        Only the training prompts of the run have a row. What is measured is not rewarded.
        """
        row = trajectory.prompt.row
        if row is None:
            return header

        response = self._tokenizer.decode(trajectory.response_ids, skip_special_tokens=True)
        said = await self._rewarder.ask(row, response, trajectory.response_ids.tolist())
        value = reward_of(self._function, said)
        if isinstance(value, Failed):
            return replace(header, reward_fault=value.cause)

        return replace(header, reward=value)

    def close(self) -> None:
        """Ends the processes of the function or grader."""
        self._rewarder.close()


def reward_of(function: str, said: Returned | Failed) -> float | Failed:
    """Returns the reward that a function gave, or why it is none."""
    if isinstance(said, Failed):
        return said

    value = said.value
    if not isinstance(value, int | float) or not isfinite(value):
        return Failed(f"{function}: returned {value!r}, which is no finite number")

    if abs(value) > LARGEST_REWARD:
        return Failed(
            f"{function}: returned {value:g}; a reward is at most {LARGEST_REWARD:g} in size"
        )

    return float(value)


class _Grading:
    """Rewards by one of our graders: 1 for a correct answer, else 0."""

    def __init__(self, reward: Reward) -> None:
        self._open = ExitStack()
        self._thread = self._open.enter_context(ThreadPoolExecutor(max_workers=1))
        self._grade = self._open.enter_context(open_grader(reward.function))

    async def ask(self, row: Row, response: str, response_ids: list[int]) -> Returned | Failed:
        reference = cast(Reference, row["answer"])
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._grade, response, reference
            )
        except ConfigError as error:  # its process cannot be started, which is no wrong answer
            return Failed(str(error))

        return Returned(1.0 if verdict is Verdict.CORRECT else 0.0)

    def close(self) -> None:
        self._open.close()


def asked_for(reward: Reward) -> Asked:
    """Returns what is asked for a reward that is a user's function."""
    return Asked(
        key=KEY,
        function=reward.function,
        kind=RewardFunction,
        options=reward.options,
    )
