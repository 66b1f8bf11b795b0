"""The pipeline of a run: its config's numbers, and its workers in their roles."""

import math
from collections.abc import Callable

from eopd.config import Config
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.preflight import Prepared
from eopd.prompts import PromptOrder
from eopd.run.progress import Progress
from eopd.runtime.supervisor import Workers
from eopd.types import LostTrajectory


def make_pipeline(
    config: Config,
    prepared: Prepared,
    workers: Workers,
    ledger: Ledger,
    progress: Progress,
    on_drop: Callable[[int, LostTrajectory], None],
) -> Pipeline:
    """The loop of a run, from where ``ledger`` and ``progress`` stand."""
    numbers = Plan(
        batch=config.batch_trajectories,
        batches=config.run.batches,
        max_staleness=config.flow.max_staleness,
        lookahead=config.flow.lookahead,
        max_attempts=config.flow.max_attempts,
        max_dropped=math.ceil(
            config.flow.max_dropped_ratio * config.batch_trajectories * config.run.batches
        ),
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        ranks=config.learner.ranks,
        optimizer_steps=config.learner.optimizer_steps_per_batch,
        token_budget=config.learner.token_budget,
        alpha_at=config.loss.alpha_at,
    )
    samples = config.rollout.samples_per_prompt
    order = PromptOrder(prepared.train.prompts, samples_per_prompt=samples, seed=config.run.seed)

    return Pipeline(
        plan=numbers,
        engines=workers.engines,
        teacher=workers.teacher,
        learner=workers.learner,
        channel=workers.channel,
        order=order,
        ledger=ledger,
        progress=progress,
        on_drop=on_drop,
    )
