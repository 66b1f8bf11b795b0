"""Measures a run on held-out prompts, and keeps samples for people to look at."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eopd.config import Config
from eopd.evaluation.held_out import NothingMeasuredError, measure
from eopd.evaluation.samples import sample_record
from eopd.hub import model_directory
from eopd.preflight import Prepared
from eopd.run.directory import RunDirectory
from eopd.runtime.logs import logger
from eopd.runtime.supervisor import Workers, fetch
from eopd.tokenizer import load_tokenizer
from eopd.types import EvalStats, LostTrajectory, ScoredTrajectory, Stored


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement: the statistics, and what the student wrote."""

    stats: EvalStats
    scored: Sequence[Stored[ScoredTrajectory]]


async def measure_held_out(
    workers: Workers,
    config: Config,
    prepared: Prepared,
    *,
    when: str,
    say: Callable[[str], None],
    doing: Callable[[str], None],
) -> Measured | None:
    """Measure student against teacher on the held-out prompts.

    Args:
        workers: the workers: engines write, teachers score, the learner measures.
        config: the run's.
        prepared: its prompts.
        when: ``before training``, or the like, for messages.
        say: is called with messages for people.
        doing: is called with how far the measurement is.

    Returns:
        The measurement; None where not a single prompt could be measured, which ends no run.
    """
    evaluation, learner = config.evaluation, config.learner
    prompts = prepared.held_out.prompts[: evaluation.prompts]
    say(f"measuring on {len(prompts)} held-out prompts, {when}")

    try:
        stats, scored = await measure(
            workers.engines,
            workers.teacher,
            workers.learner,
            prompts,
            temperature=config.rollout.temperature,
            max_tokens=config.held_out_response_tokens,
            seed=evaluation.seed,
            max_attempts=config.flow.max_attempts,
            ranks=learner.ranks,
            token_budget=learner.token_budget,
            tell=lambda done: doing(f"held-out prompts written and read: {done}/{len(prompts)}"),
        )
    except NothingMeasuredError as error:
        say(f"not measured {when}: {error}")
        return None

    if stats.num_dropped:
        say(f"{stats.num_dropped} of {len(prompts)} held-out prompts could not be measured {when}")

    return Measured(stats, scored)


async def keep_samples(
    directory: RunDirectory,
    config: Config,
    prepared: Prepared,
    *,
    phase: str,
    step: int,
    measured: Measured,
) -> None:
    """Write a measurement and its samples. A failure is logged, and ends no run."""
    try:
        samples = await _records(
            config,
            prepared,
            measured.scored[: config.evaluation.samples],
        )
        directory.add_held_out(phase, step, measured.stats, samples)
    except Exception:  # noqa: BLE001 - see above
        logger.warning("the samples of this measurement were not kept", exc_info=True)


async def _records(
    config: Config, prepared: Prepared, scored: Sequence[Stored[ScoredTrajectory]]
) -> list[Mapping[str, object]]:
    tokenizer, texts = (
        load_tokenizer(model_directory(config.student.model)),
        prepared.held_out.texts,
    )
    return [
        await asyncio.to_thread(
            sample_record, body, texts[body.trajectory.prompt.prompt_id], tokenizer
        )
        for body in await asyncio.gather(*map(fetch, scored))
        if not isinstance(body, LostTrajectory)
    ]
