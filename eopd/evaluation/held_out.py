"""Student against teacher on held-out prompts: the student writes as hot as in training, with fixed
seeds, the teacher reads, the learner measures.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence

from eopd.packing import pack
from eopd.roles import Learner, RolloutEngine, TeacherScorer
from eopd.types import EvalStats, LostTrajectory, PromptSample, Sampling, ScoredTrajectory, Stored


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
    """One response a prompt; the same prompts, seeds and order at every call. ``tell`` hears how many were written and
    read so far.

    Returns:
        The statistics, and the scored trajectories in the order of ``prompts``.

    Raises:
        RuntimeError: a trajectory was lost ``max_attempts`` times: a number over fewer prompts would not be the same
            number.
    """
    done = itertools.count(1)

    async def one(index: int, prompt: PromptSample) -> Stored[ScoredTrajectory]:
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed + index)
        for _ in range(max_attempts):  # with the same seed, so that it is the same response
            written = await engines.generate(prompt, 0, sampling)
            scored = written if isinstance(written, LostTrajectory) else await teacher.score(written)
            if isinstance(scored, Stored):
                tell(next(done))
                return scored
            last = f"{scored.reason.value}: {scored.detail}"
        raise RuntimeError(f"held-out prompt {prompt.prompt_id} was lost {max_attempts} times, last: {last}")

    scored = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    batch = pack(scored, steps=1, ranks=ranks, token_budget=token_budget, alpha=1.0)
    return await learner.evaluate(batch), scored
