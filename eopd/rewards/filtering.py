"""The filter of a run keeps or drops responses that a teacher has scored; every teacher actor has
one. It is a function of the user.
"""

from pathlib import Path
from typing import cast

import numpy as np

from eopd.config.sections import FilterConfig
from eopd.plugins import FilterFunction, Scored
from eopd.rewards.process import Asked, Failed, FunctionPool, Returned
from eopd.tokenizer import load_tokenizer
from eopd.types import Header, LostReason, LostTrajectory, ScoredTrajectory, Stored

KEY = "flow.filter.function"


class Filter:
    """A filter decodes responses with the tokenizer of ``model`` and asks the user's function, off the
    event loop.
    """

    def __init__(self, config: FilterConfig, model: Path) -> None:
        self._config = config
        self._pool = FunctionPool(asked_for(config))
        self._tokenizer = load_tokenizer(model)

    async def sift(
        self, scored: Stored[ScoredTrajectory]
    ) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Returns a scored trajectory that is kept. One that is dropped is lost as ``FILTERED``, and
        one of which the function does not say, as ``FILTER_FAILED``.

        Only the training prompts of the run have a row. What is measured is not filtered.
        """
        body = cast(ScoredTrajectory, scored.body)
        if body.trajectory.prompt.row is None:
            return scored

        key, function = scored.header.key, self._config.function
        response = self._tokenizer.decode(body.trajectory.response_ids, skip_special_tokens=True)
        keeps = decision_of(function, await self._pool.ask(seen(scored.header, body, response)))
        if isinstance(keeps, Failed):
            return LostTrajectory(
                key=key,
                reason=LostReason.FILTER_FAILED,
                detail=keeps.cause,
            )

        if not keeps:
            detail = f"{function} returned False"
            return LostTrajectory(key=key, reason=LostReason.FILTERED, detail=detail)

        trajectory = body.trajectory.without_row()

        return Stored(scored.header, ScoredTrajectory(trajectory=trajectory, signal=body.signal))

    def close(self) -> None:
        """Ends the processes of the function."""
        self._pool.close()


def asked_for(config: FilterConfig) -> Asked:
    """Returns what is asked for a filter."""
    return Asked(
        key=KEY,
        function=config.function,
        kind=FilterFunction,
        options=config.options,
    )


def decision_of(function: str, said: Returned | Failed) -> bool | Failed:
    """Returns what a filter said, or why it said nothing."""
    if isinstance(said, Failed):
        return said

    if isinstance(said.value, bool):
        return said.value

    return Failed(f"{function}: returned {said.value!r}; it must be True or False")


def seen(header: Header, scored: ScoredTrajectory, response: str) -> Scored:
    """Returns a response as the user's function sees it."""
    trajectory, signal = scored.trajectory, scored.signal
    return Scored(
        row=trajectory.prompt.row or {},
        response=response,
        response_ids=trajectory.response_ids,
        loss_mask=trajectory.loss_mask,
        rollout_logprobs=trajectory.rollout_logprobs,
        teacher_logprobs=signal.token_logprobs,
        teacher_entropy=((signal.entropy_low + signal.entropy_high) / 2).astype(np.float32),
        stop_reason=trajectory.stop_reason.value,
        reward=header.reward,
    )
