"""The numbers of a run's loop are those of its config."""

import fakes
import pytest

from eopd.config import load_config
from eopd.pipeline import Plan

OVERRIDES = [
    "rollout.samples_per_prompt=3",
    "rollout.temperature=0.7",
    "rollout.max_response_tokens=77",
    "learner.ranks=2",
    "learner.token_budget=9000",
    "flow.max_staleness=4",
    "flow.lookahead=1",
    "flow.max_attempts=5",
    "flow.max_dropped_ratio=0.011",
    "loss.alpha=0.25",
]


@pytest.fixture
def path(tmp_path):
    return fakes.write_config(tmp_path, batches=20)


def test_a_plan_holds_the_numbers_of_its_config(path):
    plan = Plan.of(load_config(path, OVERRIDES))
    assert (plan.batch, plan.batches) == (24, 20)
    assert (plan.max_staleness, plan.lookahead) == (4, 1)
    assert (plan.max_attempts, plan.max_dropped) == (5, 6), "0.011 of 480, rounded up"
    assert (plan.temperature, plan.max_response_tokens) == (0.7, 77)
    assert (plan.ranks, plan.optimizer_steps, plan.token_budget) == (2, 1, 9000)
    assert plan.streams and plan.alpha_at(0) == 0.25


def test_a_batch_of_several_optimiser_steps_is_not_begun_early(path):
    plan = Plan.of(load_config(path, ["learner.optimizer_steps_per_batch=2"]))
    assert plan.optimizer_steps == 2
    assert not plan.streams
