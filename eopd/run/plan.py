"""The numbers by which a run goes, taken from its config."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from eopd.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan holds the numbers that the loop needs; with ``streams`` the learner begins a batch
    before all of it is there.
    """

    batch: int
    batches: int
    max_staleness: int
    lookahead: int
    max_attempts: int
    max_dropped: int
    temperature: float
    max_response_tokens: int
    ranks: int
    optimizer_steps: int
    token_budget: int
    streams: bool
    alpha_at: Callable[[int], float]

    @classmethod
    def of(cls, config: Config) -> Self:
        """Returns the plan of a run."""
        return cls(
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
            streams=config.waits_for_batch is None,
            alpha_at=config.loss.alpha_at,
        )
