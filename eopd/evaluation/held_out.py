"""Measures the student against the teacher on held-out prompts: engines sample at the temperature
of training with fixed seeds, the teacher scores, the learner measures.
"""

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from eopd.packing import pack_batch
from eopd.roles import BodiesLostError, Learner, RolloutEngine, TeacherScorer
from eopd.types import (
    EvalStats,
    LostTrajectory,
    PromptSample,
    Sampling,
    ScoredTrajectory,
    Stored,
    TrajectoryKey,
)


class NothingMeasuredError(RuntimeError):
    """Not a single response could be measured; the message has how one of them was lost."""


async def measure(
    engines: RolloutEngine,
    teacher: TeacherScorer,
    learner: Learner,
    prompts: Sequence[PromptSample],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    max_attempts: int,
    ranks: int,
    token_budget: int,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[EvalStats, Sequence[Stored[ScoredTrajectory]]]:
    """Measure one response to each prompt, with the same seeds and order at every call. ``tell`` is
    called with how many were sampled and scored so far.

    Returns:
        The statistics, and the scored trajectories in the order of ``prompts``. A prompt that is
        lost ``max_attempts`` times is left out, and counted as ``num_dropped``.

    Raises:
        NothingMeasuredError: every prompt was lost.
    """
    done = itertools.count(1)
    plain = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)

    async def respond(index: int) -> Stored[ScoredTrajectory] | LostTrajectory:
        first = index - len(prompts)  # before the requests of training
        sampling = replace(plain, seed=seed + index, priority=first)
        for _ in range(max_attempts):  # with the same seed, so that it is the same response
            written = await engines.generate(prompts[index], 0, sampling)
            scored = (
                written if isinstance(written, LostTrajectory) else await teacher.score(written)
            )
            if isinstance(scored, Stored):
                tell(next(done))
                break

        return scored

    responses = await asyncio.gather(*map(respond, range(len(prompts))))

    while True:
        scored = [response for response in responses if isinstance(response, Stored)]
        if not scored:
            raise NothingMeasuredError(
                f"no held-out prompt could be measured, the last one: {responses[-1]}"
            )

        batch = pack_batch(scored, steps=1, ranks=ranks, token_budget=token_budget, alpha=1.0)

        try:
            stats = await learner.evaluate(batch)
            return replace(stats, num_dropped=len(prompts) - len(scored)), scored
        except BodiesLostError as error:
            for index in _positions(responses, error.keys):
                responses[index] = await respond(index)


def _positions(
    responses: Sequence[Stored[ScoredTrajectory] | LostTrajectory], keys: Collection[TrajectoryKey]
) -> list[int]:
    """Returns the indices of the responses with these keys."""
    return [
        index
        for index, response in enumerate(responses)
        if isinstance(response, Stored) and response.header.key in keys
    ]
