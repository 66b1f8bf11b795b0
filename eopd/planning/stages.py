"""A batch that is trained stage by stage: what each stage costs alone, on real workers and on simulated
ones.

    all prompts ──▶ engines ──▶ all responses ──▶ teachers ──▶ the batch ──▶ learner ──▶ weights
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Final

from eopd.pipeline import Pipeline
from eopd.telemetry.profile import STAGES
from eopd.types import (
    LostReason,
    LostTrajectory,
    RunFailedError,
    ScoredTrajectory,
    Stored,
    Trajectory,
)

MOST_ROUNDS: Final = 20  # in which one batch must become full


async def stage_by_stage(line: Pipeline, number: int) -> tuple[Mapping[str, float], int]:
    """Trains batch ``number`` with the roles of a loop, one stage after the other.

    The engines get all prompts of the batch at once, and the teachers all its responses once the
    last one is written. The learner gets the whole batch, and then the engines get its weights.

    Returns:
        The seconds from the first request to the last answer, of each stage; and the response
        tokens of the batch.

    Raises:
        RunFailedError: the batch did not become full, since responses are lost or filtered.
    """
    plan, seconds = line.plan, dict.fromkeys(STAGES, 0.0)
    timed = partial(_timed, line.clock, seconds)
    batch: dict[int, Stored[ScoredTrajectory]] = {}

    for _ in range(MOST_ROUNDS):
        lost = await _fill(line, batch, timed)
        if len(batch) == plan.batch:
            break
    else:
        raise RunFailedError(
            f"a batch of {plan.batch} trajectories did not become full: in {MOST_ROUNDS} attempts "
            f"{len(batch)} were kept; the last one lost was {lost[-1].key}: "
            f"{lost[-1].reason.value}: {lost[-1].detail}"
        )

    with timed("train"):
        whole = [stored for _, stored in sorted(batch.items())]
        stats = await line.learner.step(line.pack(whole, number))

    with timed("weights"):
        await line.channel.publish(stats.version)

    line.ledger.train(batch)
    return seconds, sum(stored.header.num_response_tokens for stored in whole)


async def _fill(
    line: Pipeline,
    batch: dict[int, Stored[ScoredTrajectory]],
    timed: Callable[[str], AbstractContextManager[None]],
) -> Sequence[LostTrajectory]:
    """Writes what a batch lacks, and then scores it; returns what was lost or filtered of it."""
    issues = [line.ledger.issue() for _ in range(line.plan.batch - len(batch))]
    with timed("generate"):
        written = await asyncio.gather(*(line.generate(issue, attempt=0) for issue in issues))

    with timed("score"):
        read = await asyncio.gather(*(_score(line, one) for one in written))

    lost = []
    for issue, one in zip(issues, read, strict=True):
        if not isinstance(one, LostTrajectory):
            batch[issue] = one
            continue

        lost.append(one)
        if one.reason is LostReason.FILTERED:
            line.ledger.filter(issue)
        else:
            line.ledger.drop(issue)

    return lost


async def _score(
    line: Pipeline, written: Stored[Trajectory] | LostTrajectory
) -> Stored[ScoredTrajectory] | LostTrajectory:
    return written if isinstance(written, LostTrajectory) else await line.teacher.score(written)


@contextmanager
def _timed(clock: Callable[[], float], seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = clock()
    yield
    seconds[stage] += clock() - started
