"""Held-out measurements of a run, before and after training, with the samples that people look at."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from eopd.config import Config
from eopd.evaluation.held_out import measure
from eopd.evaluation.samples import sample_record
from eopd.preflight import Prepared
from eopd.runtime.logs import logger
from eopd.runtime.run_directory import RunDirectory
from eopd.runtime.supervisor import Crew, fetch
from eopd.teacher.vocabulary import load_tokenizer
from eopd.types import EvalStats, LostTrajectory, ScoredTrajectory, Stored


async def measure_held_out(
    members: Crew, config: Config, prepared: Prepared, *, tell: Callable[[int], None]
) -> tuple[EvalStats, Sequence[Stored[ScoredTrajectory]]]:
    """Student against teacher on the held-out prompts, and what the student wrote; ``tell`` hears how far it is."""
    evaluation, learner = config.evaluation, config.learner
    return await measure(
        members.engines,
        members.teacher,
        members.learner,
        prepared.held_out.prompts[: evaluation.prompts],
        temperature=config.rollout.temperature,
        max_tokens=evaluation.max_response_tokens,
        seed=evaluation.seed,
        max_attempts=config.flow.max_attempts,
        ranks=learner.ranks,
        token_budget=learner.token_budget,
        tell=tell,
    )


async def keep_samples(
    directory: RunDirectory,
    config: Config,
    prepared: Prepared,
    *,
    phase: str,
    step: int,
    measured: tuple[EvalStats, Sequence[Stored[ScoredTrajectory]]],
) -> None:
    """Write what people look at. Nothing else may be lost with it: what goes wrong is logged."""
    stats, scored = measured
    try:
        samples = await _records(config, prepared, scored[: config.evaluation.samples])
        directory.add_samples(phase, step, samples)
        directory.add_held_out(phase, step, stats, samples)
    except Exception:  # noqa: BLE001 - see above
        logger.warning("the samples of this measurement were not kept", exc_info=True)


async def _records(
    config: Config, prepared: Prepared, scored: Sequence[Stored[ScoredTrajectory]]
) -> list[Mapping[str, object]]:
    tokenizer, texts = load_tokenizer(config.student.model), prepared.held_out.texts
    return [
        await asyncio.to_thread(sample_record, body, texts[body.trajectory.prompt.prompt_id], tokenizer)
        for body in await asyncio.gather(*map(fetch, scored))
        if not isinstance(body, LostTrajectory)
    ]
