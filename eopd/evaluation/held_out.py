"""Measures the student against the teacher on held-out prompts: engines sample at the temperature
of training with fixed seeds, the teacher scores, the learner measures.
"""

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from eopd.config import Config
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


async def measure_held_out(
    engines: RolloutEngine,
    teacher: TeacherScorer,
    learner: Learner,
    prompts: Sequence[PromptSample],
    config: Config,
    *,
    when: str,
    say: Callable[[str], None],
    doing: Callable[[str], None],
) -> tuple[EvalStats, Sequence[Stored[ScoredTrajectory]]] | None:
    """Measure one response to each of the first ``evaluation.prompts`` prompts, with the same seeds and
    order at every call. ``say`` is called with messages for people, which tell ``when`` it was, and
    ``doing`` with how far the measurement is.

    Returns:
        The statistics, and the scored trajectories in the order of ``prompts``. A prompt that is
        lost ``flow.max_attempts`` times is left out, and counted as ``num_dropped``; so is one whose
        numbers are not finite. None where none is left, which ends no run.
    """
    prompts = prompts[: config.evaluation.prompts]
    say(f"measuring on {len(prompts)} held-out prompts, {when}")
    done = itertools.count(1)

    async def respond(index: int) -> Stored[ScoredTrajectory] | LostTrajectory:
        first = index - len(prompts)  # before the requests of training
        scored = await _scored(engines, teacher, config, prompts[index], index, first)
        if isinstance(scored, Stored):
            doing(f"held-out prompts written and read: {next(done)}/{len(prompts)}")

        return scored

    responses = await asyncio.gather(*map(respond, range(len(prompts))))

    packed = partial(
        pack_batch,
        steps=1,
        ranks=config.learner.ranks,
        token_budget=config.learner.token_budget,
        alpha=1.0,
    )
    while scored := [response for response in responses if isinstance(response, Stored)]:
        try:
            stats = await learner.evaluate(packed(scored))
        except BodiesLostError as error:
            for index in _positions(responses, error.keys):
                responses[index] = await respond(index)
        else:
            num_dropped = len(prompts) - stats.num_prompts
            if num_dropped:
                say(
                    f"{num_dropped} of {len(prompts)} held-out prompts could not be measured {when}: "
                    "their responses are lost, or their numbers not finite"
                )

            return (replace(stats, num_dropped=num_dropped), scored) if stats.num_prompts else None

    say(f"not measured {when}: no held-out prompt could be, the last one: {responses[-1]}")
    return None


async def _scored(
    engines: RolloutEngine,
    teacher: TeacherScorer,
    config: Config,
    prompt: PromptSample,
    index: int,
    priority: int,
) -> Stored[ScoredTrajectory] | LostTrajectory:
    """Returns a scored response; every attempt has the same seed, so that it is the same one."""
    sampling = Sampling(
        temperature=config.rollout.temperature,
        max_tokens=config.held_out_response_tokens,
        seed=(config.evaluation.seed + index) % 2**64,
        priority=priority,
    )
    for _ in range(config.flow.max_attempts):
        written = await engines.generate(prompt, 0, sampling)
        scored = written if isinstance(written, LostTrajectory) else await teacher.score(written)
        if isinstance(scored, Stored):
            break

    return scored


def _positions(
    responses: Sequence[Stored[ScoredTrajectory] | LostTrajectory], keys: Collection[TrajectoryKey]
) -> list[int]:
    """Returns the indices of the responses with these keys."""
    return [
        index
        for index, response in enumerate(responses)
        if isinstance(response, Stored) and response.header.key in keys
    ]
