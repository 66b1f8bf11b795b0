"""The ZeRO stage that ``auto`` chooses: a table of learners, and what a config says of its own."""

import fakes
import pytest

from eopd.config import LearnerConfig, dump_config, load_config
from eopd.config.choices import choice_notes, choose_zero_stage, with_choices_of

TABLE = {  # ranks, dtype, what is offloaded
    (1, "float32", ()): (0, "the fastest on one rank in float32"),
    (1, "bfloat16", ()): (1, "the fastest on one rank in bfloat16"),
    (2, "float32", ()): (1, "shards the optimiser's state over 2 ranks"),
    (8, "bfloat16", ()): (1, "shards the optimiser's state over 8 ranks"),
    (1, "float32", ("offload_optimizer",)): (1, "the lowest with offload_optimizer"),
    (2, "bfloat16", ("offload_optimizer",)): (1, "the lowest with offload_optimizer"),
    (1, "float32", ("offload_param",)): (3, "the lowest with offload_param"),
    (1, "bfloat16", ("offload_optimizer", "offload_param")): (3, "the lowest with offload_param"),
    (4, "float32", ("offload_param", "offload_optimizer")): (3, "the lowest with offload_param"),
}
ZERO = "learner.deepspeed.zero_optimization"


@pytest.mark.parametrize("learner", TABLE, ids=str)
def test_the_stage_follows_ranks_dtype_and_what_is_offloaded(learner):
    ranks, dtype, offloaded = learner
    assert choose_zero_stage(ranks=ranks, dtype=dtype, offloaded=offloaded) == TABLE[learner]


@pytest.fixture
def load(tmp_path):
    path = fakes.write_config(tmp_path)

    def load(*overrides):
        return load_config(path, ("student.dtype=float32", "teachers.0.dtype=float32", *overrides))

    return load


@pytest.mark.parametrize(
    ("overrides", "stage", "reason"),
    [
        ((), 0, "auto: the fastest on one rank in float32"),
        (("learner.zero_stage=auto",), 0, "auto: the fastest on one rank in float32"),
        (("student.dtype=bfloat16",), 1, "auto: the fastest on one rank in bfloat16"),
        (("learner.ranks=3",), 1, "auto: shards the optimiser's state over 3 ranks"),
        ((f"{ZERO}.offload_optimizer.device=cpu",), 1, "auto: the lowest with offload_optimizer"),
        ((f"{ZERO}.offload_optimizer.device=none",), 0, "auto: the fastest on one rank in float32"),
        ((f"{ZERO}.offload_param.device=cpu",), 3, "auto: the lowest with offload_param"),
        (("learner.zero_stage=2",), 2, None),
        (("learner.zero_stage=0", "learner.ranks=2"), 0, None),
    ],
)
def test_the_stage_and_why_stand_in_the_resolved_config(load, tmp_path, overrides, stage, reason):
    config = load(*overrides)
    learner = config.learner
    assert (learner.zero_stage, learner.zero_stage_reason) == (stage, reason)
    assert type(learner.chosen_zero_stage) is int
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert f"\n  zero_stage: {stage}\n" in resolved.read_text()
    assert load_config(resolved) == config


def test_the_choice_is_noted_beside_the_precision(load):
    assert choice_notes(load()) == [
        "learner.zero_stage: 0 (auto: the fastest on one rank in float32)"
    ]
    assert choice_notes(load("learner.zero_stage=2")) == []
    served = "teachers.0={model: t, backend: eopd, server: {url: 'http://host:1'}}"
    of_teacher, of_learner = choice_notes(load(served, "learner.ranks=2"))
    assert of_teacher.startswith("teachers.teacher.dtype: bfloat16 (auto: ")
    assert of_learner == ("learner.zero_stage: 1 (auto: shards the optimiser's state over 2 ranks)")


def test_a_value_that_is_set_over_a_chosen_one_has_no_reason(load, tmp_path):
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(load("student.dtype=auto", "teachers.0.dtype=auto")))
    assert load_config(resolved).student.dtype_reason is not None
    values = ("learner.zero_stage=2", "student.dtype=bfloat16", "teachers.0.dtype=float32")
    config = load_config(resolved, values)
    for section in (config.student, config.teachers[0]):
        assert section.dtype_reason is None

    assert (config.learner.zero_stage, config.learner.zero_stage_reason) == (2, None)
    again = load_config(resolved, ("learner.zero_stage=auto", "learner.ranks=2"))
    assert again.learner.zero_stage == 1


def test_a_config_that_goes_on_keeps_what_its_user_wrote(load):
    assert with_choices_of(load("learner.ranks=2"), load("learner.zero_stage=3")) == load(
        "learner.zero_stage=3"
    )


def test_nothing_takes_auto_for_a_stage():
    with pytest.raises(ValueError, match=r"learner.zero_stage: auto is chosen by load_config"):
        LearnerConfig().chosen_zero_stage  # noqa: B018
