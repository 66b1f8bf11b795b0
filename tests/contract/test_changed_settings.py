"""A checkpoint on real DeepSpeed, continued with other settings: those of the config hold, not
those it was saved with.

``run_rank`` is the program of a rank.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from gang import asked_for, read_seen, run_gang, start_learner, write_models
from test_checkpoints import (
    CASES,
    LAST,
    OFFLOADED_CASES,
    SAVED_AT,
    VOCABULARY,
    Case,
    make_batch,
    student_of,
)

from eopd.config import LearnerConfig, LossConfig

SAVED = {
    "lr": 3e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
}
CHANGED = {
    "lr": 1e-3,
    "betas": (0.8, 0.9),
    "weight_decay": 0.2,
    "max_grad_norm": 0.5,
    "schedule": "linear",
}
STILL = {"lr": 1e-30}  # nothing moves
HALVED = {"optimizer_steps_per_batch": 2}
ALL = CASES + OFFLOADED_CASES
QUICK = {"float32-1", "float32-1-offloaded", "bfloat16-3"}
# Cases whose checkpoints another continues: the same state, held in another way.
OTHERS = {
    "float32-1": ("float32-1-offloaded", "float32-2"),
    "float32-2": ("float32-2-offloaded", "float32-1"),
    "float32-3": ("float32-3-offloaded",),
    "bfloat16-1": ("bfloat16-1-offloaded", "bfloat16-2"),
    "bfloat16-2": ("bfloat16-2-offloaded", "bfloat16-1"),
    "bfloat16-3": ("bfloat16-3-offloaded",),
    "float32-1-offloaded": ("float32-1",),
    "float32-3-offloaded": ("float32-3",),
}


def run_rank(rank: int, world_size: int, port: int, root: Path, names: list[str]) -> None:
    from eopd.learner.learner import LearnerRank

    def learner_of(case: Case, **settings: Any) -> LearnerRank:
        config = LearnerConfig(
            **SAVED | settings,
            zero_stage=case.stage,
            logit_chunk_tokens=16,
            deepspeed={"zero_optimization": case.zero},
        )
        return start_learner(
            student_of(case, root),
            config,
            LossConfig(top_k=4),
            total_batches=LAST if settings != CHANGED else 2 * LAST,
            seed=7,
            root=root,
            rank=rank,
            world_size=world_size,
            port=port,
        )

    def train(learner: LearnerRank, first: int, last: int) -> list[dict[str, float]]:
        return [
            dict(learner.step(make_batch(n, world_size).share(rank)).metrics)
            for n in range(first, last)
        ]

    def loaded(case: Case, of: Case, **settings: Any) -> LearnerRank:
        learner = learner_of(case, **settings)
        learner.load(root / of.name)
        return learner

    seen: dict[str, Any] = {}
    cases = [case for case in ALL if case.name in names]

    for case in cases:
        learner = learner_of(case)
        train(learner, 0, SAVED_AT)
        learner.save(root / case.name)
        seen[case.name] = {"unchanged": train(learner, SAVED_AT, LAST)}
        learner = loaded(case, case, **CHANGED)
        (group,) = learner._backend._engine.lr_scheduler.optimizer.param_groups
        seen[case.name]["group"] = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        if case.name != "float32-0":
            seen[case.name]["clip"] = learner._backend._engine.optimizer.clip_grad

        seen[case.name]["changed"] = train(learner, SAVED_AT, LAST)
        learner = loaded(case, case, **STILL)
        learner.export(root / f"{case.name}-before")
        train(learner, SAVED_AT, SAVED_AT + 2)
        learner.export(root / f"{case.name}-after")
        seen[case.name]["halved"] = loaded(
            case, case, **HALVED
        )._backend._engine.lr_scheduler.last_epoch

    for case, of in itertools.product(cases, cases):
        if case.name in OTHERS.get(of.name, ()):
            seen[of.name][case.name] = train(loaded(case, of), SAVED_AT, LAST)

    (root / f"seen-{world_size}-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("changed")
    return write_models(
        directory,
        "qwen3",
        "llama",
        vocabulary=VOCABULARY,
        layers=1,
        hidden=62,
    )


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, root: Path) -> dict[str, Any]:
    names = {name for pair in asked_for(request, "of", "case") for name in pair}
    run_gang(
        root,
        2,
        __file__,
        sorted(names | {name for (name,) in asked_for(request, "case")}),
    )
    return read_seen(root, 2)[0]


def slow_unless_quick(*names: str) -> Any:
    return pytest.param(*names, marks=() if QUICK.issuperset(names) else pytest.mark.slow)


every_case = pytest.mark.parametrize("case", [slow_unless_quick(case.name) for case in ALL])


@every_case
def test_the_optimiser_goes_on_as_the_config_says(seen, case):
    rate = 1e-3 * (1 - SAVED_AT / (2 * LAST))  # linear, to zero at the end of twice as many batches
    assert seen[case]["group"] == {
        "lr": pytest.approx(rate),
        "betas": [0.8, 0.9],
        "weight_decay": 0.2,
    }
    assert seen[case].get("clip", 0.5) == 0.5
    rates = [row["eopd_learning_rate"] for row in seen[case]["changed"]]
    assert rates == pytest.approx(
        [1e-3 * (1 - step / (2 * LAST)) for step in range(SAVED_AT, LAST)]
    )
    assert seen[case]["changed"][0]["eopd_loss"] == seen[case]["unchanged"][0]["eopd_loss"], (
        "the same weights"
    )
    assert seen[case]["changed"][-1]["eopd_loss"] != seen[case]["unchanged"][-1]["eopd_loss"]


@every_case
def test_no_learning_rate_of_the_checkpoint_is_applied(seen, root, case):
    before, after = (
        (root / f"{case}-{when}" / "model.safetensors").read_bytes() for when in ("before", "after")
    )
    assert before == after


@every_case
def test_a_schedule_counts_batches_whatever_the_steps_of_each(seen, case):
    assert seen[case]["halved"] == 2 * SAVED_AT


@pytest.mark.parametrize(
    ("of", "case"), [slow_unless_quick(of, case) for of, cases in OTHERS.items() for case in cases]
)
def test_a_state_may_be_held_in_another_way(seen, of, case):
    exact = of.startswith("float32")
    for metric, tolerance in {
        "eopd_loss": 1e-4 if exact else 0.01,
        "eopd_grad_norm": 1e-4 if exact else 0.03,
    }.items():
        actual = [row[metric] for row in seen[of][case]]
        expected = [row[metric] for row in seen[of]["unchanged"]]
        assert actual == pytest.approx(expected, rel=tolerance), metric
