"""Runs the loop of a run in virtual time, with workers that sleep for as long as their work would take.

    rates, lengths ─▶ engines, replicas, ranks ─▶ the loop (pipeline.py, pool.py, buffer.py) ─▶ Simulation
                      that sleep (workers.py)     as in a run

What waits for what is decided by the code of a run, and nothing of it is repeated here. Assumed:

* The work of a response is its tokens, in every stage. The rank that has most of a part decides
  how long the part takes.
* Rates are those of ``eopd profile``: each stage alone, with a whole batch of the config at once,
  to its last response. While the last ones are written, engines are not full; so the rate of a
  full engine is the one with which a batch takes as long as the profile says (``full_rates``).
* An engine is full with its share of such a batch, or with ``full_at`` responses. Fewer are
  written no faster each, as where every token waits for the weights to be read; with more, each
  gets its part of the rate. With ``full_at`` 1 an engine does its whole rate however many there
  are, as where arithmetic is what takes the time.
* All teachers are one, with all replicas; one behind a server takes no time. Nothing is lost, the
  driver and the network cost nothing, and new weights do not pause an engine.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np

from eopd.config import Config
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.planning.balance import WORKERS, Balance, Counts, batch_of, counts_of
from eopd.planning.needs import Hardware
from eopd.planning.stages import stage_by_stage
from eopd.planning.virtual import VirtualLoop
from eopd.planning.workers import Roles, Work
from eopd.prompts import PromptOrder
from eopd.roles import Learner
from eopd.run.progress import Progress
from eopd.telemetry.step import PARTS
from eopd.types import PromptSample, StepDone

_WARM_UP: Final = 3  # steps, and as many more as a trajectory may be stale
_RESPONSES: Final = 20_000  # that are measured, in at least and at most so many steps
_FEWEST_STEPS, _MOST_STEPS = 4, 100
_RESPONSES_ALONE: Final = 4_000  # by which the rates of full workers are found
_PROMPTS: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What ``steps`` steps were like, after some that warmed up.

    ``busy`` is the share of time in which a worker of a stage has something to do, in the mean over
    its workers. ``engines_full`` is what engines wrote, of what they would if always full.
    ``learner`` has the shares of what the learner did: train, weights, and its two waits.
    Staleness is in versions, its mean over trajectories.
    """

    counts: Counts
    batch: int
    max_staleness: int
    steps: int
    steps_per_hour: float
    tokens_per_s: float
    busy: Mapping[str, float]
    engines_full: float
    learner: Mapping[str, float]
    staleness_mean: float
    staleness_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A simulation beside what the closed formulas say of the same workers and batch."""

    balance: Balance
    simulation: Simulation

    @property
    def closed_steps(self) -> float:
        """The steps an hour of the closed formula: of stages that overlap, or where the flow is
        synchronous, of stages that follow one another.
        """
        synchronous = self.simulation.max_staleness == 0
        return self.balance.in_turn_steps if synchronous else self.balance.steps_per_hour


def simulate_each(
    config: Config, work: Work, balances: Sequence[Balance], hardware: Hardware
) -> list[Simulated]:
    """Simulates a run with the workers of each balance. The first has the batch of the config, and the
    others have as many trajectories a device.

    Args:
        config: of the run, with the workers and the batch for which rates were measured.
        work: what its stages have to do, at the rates that were measured.
        balances: the workers and devices.
        hardware: says how many requests an engine holds at a time where the config does not.
    """
    full = full_rates(config, work, hardware)
    rows = []
    for balance in balances:
        batch = batch_of(config, balance.devices, balances[0].devices)
        simulation = simulate(config, full, counts=balance.counts, batch=batch, hardware=hardware)
        rows.append(Simulated(balance=balance, simulation=simulation))

    return rows


def full_rates(config: Config, work: Work, hardware: Hardware) -> Work:
    """Returns the same work with the rates of full workers: those with which the workers of the
    config take as long for batches, stage by stage, as the rates of ``work`` say.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        spent, tokens = runner.run(_alone(config, work, hardware))

    full = dict(work.rates)
    for stage, count in counts_of(config).items():
        full[stage] *= spent[stage] * count * work.rates[stage] / tokens

    return replace(work, rates=full)


def simulate(
    config: Config, full: Work, *, counts: Counts, batch: int, hardware: Hardware
) -> Simulation:
    """Simulates a run of a config with these workers and this batch.

    Args:
        config: of the run, with the workers and the batch for which rates were measured.
        full: what its stages have to do, at the rates of full workers.
        counts: the workers of each stage; without ``score``, scoring takes no time.
        batch: the trajectories of a batch.
        hardware: says how many requests an engine holds at a time where the config does not.
    """
    measured = min(max(_RESPONSES // batch, _FEWEST_STEPS), _MOST_STEPS)
    staleness = config.flow.max_staleness
    plan = replace(
        Plan.of(config),
        batch=batch,
        # at the end of a run engines have nothing to do any more, which is not measured
        batches=_WARM_UP + staleness + measured + staleness + 1,
        ranks=counts["train"],
    )
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_simulate(config, full, plan, measured, counts, hardware))


async def _alone(config: Config, work: Work, hardware: Hardware) -> tuple[Mapping[str, float], int]:
    """Returns the seconds of each stage for some batches, each stage alone with a whole batch at once;
    and their response tokens.
    """
    roles = Roles(config, work, counts_of(config), hardware)
    line = _line(Plan.of(config), roles, _order(config))
    spent, tokens = dict.fromkeys(WORKERS, 0.0), 0

    for number in range(math.ceil(_RESPONSES_ALONE / line.plan.batch)):
        seconds, more = await stage_by_stage(line, number)
        tokens += more
        for stage in spent:
            spent[stage] += seconds[stage]

    return spent, tokens


def _line(plan: Plan, roles: Roles, order: PromptOrder) -> Pipeline:
    """Returns a loop in virtual time."""
    return Pipeline(
        plan,
        roles,
        roles,
        cast(Learner, roles),  # the loop calls no other methods of it
        roles,
        order,
        Ledger(),
        Progress(),
        clock=asyncio.get_running_loop().time,
    )


async def _simulate(
    config: Config, full: Work, plan: Plan, measured: int, counts: Counts, hardware: Hardware
) -> Simulation:
    """Runs the loop up to the end of the last step that is measured."""
    roles = Roles(config, full, counts, hardware)
    line = _line(plan, roles, _order(config))
    clock = line.clock
    done: list[StepDone] = []
    warm_up = plan.batches - measured - config.flow.max_staleness - 1
    started = 0.0

    async with aclosing(line.steps(0)) as steps:
        async for step in steps:
            number = step.stats.version.step
            if number > warm_up:
                done.append(step)
            elif number == warm_up:
                started = clock()
                roles.busy()

            if len(done) == measured:
                break

        return _summary(done, roles, plan, counts, full, clock() - started)


def _summary(
    done: Sequence[StepDone], roles: Roles, plan: Plan, counts: Counts, full: Work, seconds: float
) -> Simulation:
    """Returns what steps were like that took so many seconds together."""
    learner = {part: sum(step.seconds[part] for step in done) / seconds for part in PARTS}
    headers = [header for step in done for header in step.trained.values()]
    stale = [
        step.stats.version.step - 1 - header.oldest_version
        for step in done
        for header in step.trained.values()
    ]
    tokens = sum(header.num_response_tokens for header in headers)
    busy = {stage: spent / seconds for stage, spent in roles.busy().items()}

    return Simulation(
        counts=counts,
        batch=plan.batch,
        max_staleness=plan.max_staleness,
        steps=len(done),
        steps_per_hour=3600.0 * len(done) / seconds,
        tokens_per_s=tokens / seconds,
        busy=busy | {"train": learner["train"]},
        engines_full=tokens / seconds / (counts["generate"] * full.rates["generate"]),
        learner=learner,
        staleness_mean=sum(stale) / len(stale),
        staleness_max=max(stale),
    )


def _order(config: Config) -> PromptOrder:
    """Returns prompts of full length, in the order of the run's seed."""
    token_ids = np.zeros(config.prompts.max_tokens, np.int32)
    prompts = [
        PromptSample(
            epoch=0,
            prompt_id=str(number),
            source="simulated",
            token_ids=token_ids,
            reference_answer=None,
        )
        for number in range(_PROMPTS)
    ]
    return PromptOrder(
        prompts, samples_per_prompt=config.rollout.samples_per_prompt, seed=config.run.seed
    )
