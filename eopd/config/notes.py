"""What a config says that is odd and can be meant: said by ``eopd check`` and at the start of a run, never refused."""

import itertools
from collections.abc import Iterator
from typing import Final

from eopd.config.sections import Config

HIGH_LR: Final = 0.1
MANY_BATCHES: Final = 1_000_000
STALE: Final = 64


def notes(config: Config) -> list[str]:
    """One sentence for each odd thing, beginning with its key; see ``preflight.notes`` for what the data tells."""
    return list(itertools.chain(_of_length(config), _of_learning(config), _of_flow(config)))


def _of_length(config: Config) -> Iterator[str]:
    """What does not fit the length of the run."""
    batches, warmup = config.run.batches, config.loss.alpha_warmup
    if batches > MANY_BATCHES:
        yield f"run.batches: {batches} are {batches / 86_400:.0f} days at a batch a second"
    if config.learner.warmup_batches >= batches:
        yield (
            f"learner.warmup_batches: {config.learner.warmup_batches} is not below run.batches {batches}; "
            "learner.lr is reached at the end or never"
        )
    if warmup.start < 1.0 and warmup.batches >= batches:
        yield (
            f"loss.alpha_warmup.batches: {warmup.batches} is not below run.batches {batches}; "
            "loss.alpha is reached at the end or never"
        )
    if warmup.start < 1.0 and warmup.batches == 0:
        yield "loss.alpha_warmup.start: has no effect while loss.alpha_warmup.batches is 0"
    if config.checkpoint.every > batches:
        yield f"checkpoint.every: {config.checkpoint.every} is above run.batches {batches}; the only one is at the end"


def _of_learning(config: Config) -> Iterator[str]:
    """What makes the student learn something else than the defaults do."""
    loss, learner, rollout = config.loss, config.learner, config.rollout
    if learner.lr > HIGH_LR:
        yield f"learner.lr: {learner.lr:g} moves every weight by about as much in each step"
    if learner.betas[0] > learner.betas[1]:
        yield f"learner.betas: {learner.betas[0]:g} before {learner.betas[1]:g}; the first is usually the smaller"
    if loss.top_k == 1:
        yield "loss.top_k: the forward KL compares the teacher's first candidate alone"
    if loss.alpha == 0.0 and loss.gate.kind != "never":
        yield "loss.gate: has no effect while loss.alpha is 0"
    for teacher in config.teachers:
        if teacher.temperature != rollout.temperature:
            yield (
                f"teachers.{teacher.name}.temperature: {teacher.temperature:g} differs from rollout.temperature "
                f"{rollout.temperature:g}; the student learns a sharper or flatter distribution than its own"
            )


def _of_flow(config: Config) -> Iterator[str]:
    """What the run reads, and how old it may be."""
    if config.flow.max_staleness > STALE:
        yield f"flow.max_staleness: trajectories may be {config.flow.max_staleness} versions behind what is trained"
    if config.prompts.data == config.prompts.held_out:
        yield "prompts.held_out: is prompts.data; held-out numbers are then those of training"
