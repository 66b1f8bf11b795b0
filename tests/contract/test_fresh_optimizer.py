"""A learner that goes on with a fresh optimiser takes AdamW's first step: it moves every weight that
has a gradient by the learning rate, whatever the gradient is. With its moments kept it does not.

``run_rank`` is the program of a rank.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import (
    TOP_K,
    asked_for,
    read_seen,
    run_gang,
    scored_trajectory,
    start_learner,
    store,
    write_models,
)

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.learner.lora import whole_tensors
from eopd.packing import pack_batch
from eopd.types import PackedBatch

RANKS, STEPS = 2, 3
RATE = 0.25  # many times what bfloat16 resolves
CASES = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in range(4)]
QUICK = [("float32", 0), ("bfloat16", 1), ("float32", 3)]


def make_batch(number: int) -> PackedBatch:
    rng = np.random.default_rng(number)
    scored = [
        scored_trajectory(
            rng,
            epoch=number,
            index=index,
            prompt_length=4,
            loss_mask=np.ones(8, bool),
            sharpness=3.0,
        )
        for index in range(4)
    ]
    return pack_batch(
        list(map(store, scored)),
        steps=1,
        ranks=RANKS,
        token_budget=64,
        alpha=1.0,
    )


def run_rank(rank: int, world_size: int, port: int, root: Path, cases: list[Any]) -> None:
    def learner_of(dtype: str, stage: int, rate: float):
        return start_learner(
            StudentConfig(model=root / "qwen3", dtype=dtype),
            LearnerConfig(lr=rate, weight_decay=0.0, zero_stage=stage),
            LossConfig(top_k=TOP_K),
            total_batches=9,
            seed=7,
            root=root,
            rank=rank,
            world_size=world_size,
            port=port,
        )

    def weights(learner):
        copies = {}
        for name, tensor in whole_tensors(learner.model).items():
            with learner.backend.gathered(tensor.parts):
                copies[name] = tensor.whole().float().clone()

        return copies

    seen: dict[str, float] = {}
    for dtype, stage in cases:
        saved = root / f"{dtype}-{stage}"
        first = learner_of(dtype, stage, 3e-3)
        for number in range(STEPS):
            first.step(make_batch(number).share(rank))

        first.save(saved)
        for fresh in (True, False):
            learner = learner_of(dtype, stage, RATE)
            learner.load(saved, fresh_optimizer=fresh)
            before = weights(learner)
            learner.step(make_batch(STEPS).share(rank))
            after = weights(learner)
            moves = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
            moved = moves[moves > 0.02 * RATE] / RATE
            by_the_rate = ((moved > 0.95) & (moved < 1.05)).float().mean()
            seen[f"{dtype}-{stage}-{fresh}"] = by_the_rate.item()

    (root / f"seen-{world_size}-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory) -> list[dict[str, float]]:
    root = write_models(tmp_path_factory.mktemp("fresh"), "qwen3", layers=1)
    run_gang(root, RANKS, __file__, asked_for(request, "dtype", "stage"))
    return read_seen(root, RANKS)


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        pytest.param(
            *case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, case))
        )
        for case in CASES
    ],
)
def test_the_first_step_of_a_fresh_optimiser_is_adams_first(seen, dtype, stage):
    for of_rank in seen:
        assert of_rank[f"{dtype}-{stage}-True"] > 0.97
        assert of_rank[f"{dtype}-{stage}-False"] < 0.5
