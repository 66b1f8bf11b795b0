"""Checkpoints of the learner on real DeepSpeed: exported without it, continued by another number of
ranks, and the same for states that are offloaded.

``run_rank`` is the program of a rank.
"""

import dataclasses
import itertools
import json
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
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

from eopd.cli.main import main
from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.run.checkpoint import write_manifest
from eopd.run.storage import StorageError
from eopd.types import OptimizerStep, PackedBatch, PolicyVersion, ScoredTrajectory, Stored

VOCABULARY = 277  # no weight has a multiple of three entries: shards are padded
SAVED_AT, LAST = 2, 7  # batches: a checkpoint after each, and five steps between

# A run is named by the ranks that held it in turn. By gang: its ranks, and the runs it holds, each
# begun or continued from another's first checkpoint.
GANGS = {
    "a": (1, {"1": None, "1-1": "1"}),
    "b": (2, {"2": None, "1-2": "1"}),
    "c": (3, {"2-3": "2", "1-2-3": "1-2"}),
    "d": (1, {"2-1": "2", "1-2-3-1": "1-2-3"}),
}
PASSED_ON = "1-2-3"  # saved again as it was loaded
FIRST = Path("checkpoints", f"step-{SAVED_AT:06d}", "learner")
SOURCES = {run: source for _, runs in GANGS.values() for run, source in runs.items()}


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint."""

    family: str
    dtype: str
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.stage}" + (
            "-offloaded" if self.zero.keys() & OFFLOADED.keys() else ""
        )


# Stage 3 as a large model has it: several groups of parameters, some parameters sharded, some not.
SEVERAL_GROUPS = {"sub_group_size": 5_000, "stage3_param_persistence_threshold": 1_000}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
OPTIMIZER_OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    Case("qwen3", "float32", 0),
    Case("llama", "float32", 1),
    Case("llama", "float32", 2),
    Case("qwen3", "float32", 3, SEVERAL_GROUPS),
    Case("llama", "bfloat16", 0),
    Case("qwen3", "bfloat16", 1),
    Case("qwen3", "bfloat16", 2),
    Case("llama", "bfloat16", 3, SEVERAL_GROUPS),
]
OFFLOADED_CASES = [
    dataclasses.replace(
        case, zero=case.zero | (OFFLOADED if case.stage == 3 else OPTIMIZER_OFFLOADED)
    )
    for case in CASES
    if case.stage > 0
]


def runs_of(case: Case) -> set[str]:
    return {"1", "2", "1-1", "1-2"} if case in OFFLOADED_CASES else set(SOURCES)


# One kind of each stage and dtype, and ranks that become more and fewer; the rest of the matrix is
# slow.
QUICK_CASES, QUICK_RUNS = (
    {"float32-1", "bfloat16-3", "bfloat16-2-offloaded"},
    {"1", "2", "1-1", "1-2", "2-1"},
)


def every_run(
    *names: str, cases: Sequence[Case] = (*CASES, *OFFLOADED_CASES)
) -> pytest.MarkDecorator:
    """Cases and those of their runs that are named."""
    params = []
    for case, run in itertools.product(cases, names):
        if run in runs_of(case):
            quick = case.name in QUICK_CASES and run in QUICK_RUNS
            params.append(
                pytest.param(
                    case,
                    run,
                    marks=() if quick else pytest.mark.slow,
                    id=f"{case.name}-{run}",
                )
            )

    return pytest.mark.parametrize(("case", "run"), params)


def needed(asked: Iterable[tuple[Case, str]]) -> list[tuple[str, str]]:
    """Names of these cases and runs, of those they go on from, and of those that offloaded
    ones are compared with.
    """
    found = set()
    for case, last in asked:
        run: str | None = last
        while run is not None:
            found |= {(case.name, run), (f"{case.dtype}-{case.stage}", run)}
            run = SOURCES[run]

    return sorted(found)  # a run stands after the one it goes on from


def student_of(case: Case, root: Path) -> StudentConfig:
    return StudentConfig(model=root / case.family, dtype=case.dtype)


def make_batch(number: int, world_size: int, *, spoiled: bool = False) -> PackedBatch:
    """Six trajectories in two micro-batches a rank."""
    rng = np.random.default_rng(number)
    stored = [make_stored(rng, number, index) for index in range(6)]
    if spoiled:
        stored[1].body.signal.token_logprobs[:] = np.nan

    shares = [stored[rank::world_size] for rank in range(world_size)]
    ranks = tuple((tuple(share[:1]), tuple(share[1:])) for share in shares)

    return PackedBatch(
        steps=(
            OptimizerStep(
                num_loss_tokens=sum(s.header.num_loss_tokens for s in stored), ranks=ranks
            ),
        ),
        alpha=1.0,
    )


def make_stored(rng: np.random.Generator, number: int, index: int) -> Stored[ScoredTrajectory]:
    return store(
        scored_trajectory(
            rng,
            epoch=number,
            index=index,
            prompt_length=4,
            loss_mask=np.ones(int(rng.integers(3, 9)), bool),
            sharpness=3.0,
            vocabulary=VOCABULARY,
        )
    )


# --- the program of a rank


def run_rank(
    rank: int, world_size: int, port: int, root: Path, cases: list[list[str]], gang: str
) -> None:
    from eopd.learner.learner import LearnerRank

    def learner_of(case: Case) -> LearnerRank:
        return start_learner(
            student_of(case, root),
            LearnerConfig(
                lr=3e-3,
                weight_decay=0.1,
                schedule="cosine",
                warmup_batches=4,
                zero_stage=case.stage,
                logit_chunk_tokens=16,
                deepspeed={"zero_optimization": case.zero},
            ),
            LossConfig(top_k=TOP_K),
            total_batches=LAST + 3,
            seed=7,
            root=root,
            rank=rank,
            world_size=world_size,
            port=port,
        )

    def train(learner: LearnerRank, first: int, last: int) -> list[dict[str, float]]:
        stats = [learner.step(make_batch(n, world_size).share(rank)) for n in range(first, last)]
        return [dict(one.metrics) for one in stats]

    seen: dict[str, Any] = {}

    for case_name, name in cases:
        case = next(one for one in CASES + OFFLOADED_CASES if one.name == case_name)
        source = SOURCES[name]
        learner = learner_of(case)
        run = root / "runs" / f"{case.name}-{name}"
        metrics: list[dict[str, float]] = []
        if source is None:
            metrics += train(learner, 0, SAVED_AT)
            torch.rand(rank + 1)  # so that the ranks' random states differ
        else:
            learner.version = PolicyVersion(name.count("-"), 0)
            learner.load(root / "runs" / f"{case.name}-{source}" / FIRST)

        learner.save(run / FIRST)
        learner.export(run / f"expected-{SAVED_AT}")
        draw = torch.rand(1).item()
        # an update that is skipped, and leaves no trace in those after it but its count
        if source is None:
            learner.step(make_batch(LAST, world_size, spoiled=True).share(rank))

        if name != PASSED_ON:
            metrics += train(learner, SAVED_AT, LAST)

        if source is None:
            learner.save(run / f"checkpoints/step-{LAST:06d}/learner")
            learner.export(run / f"expected-{LAST}")

        seen[f"{case.name}-{name}"] = {"metrics": metrics, "draw": draw, "version": learner.version}

    (root / f"seen-{gang}-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(
        tmp_path_factory.mktemp("checkpoints"),
        "qwen3",
        "llama",
        vocabulary=VOCABULARY,
        layers=1,
        hidden=62,
    )


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, root: Path) -> dict[str, list[dict[str, Any]]]:
    """By case and run, what every rank saw; a gang is launched once."""
    cases = needed(asked_for(request, "case", "run"))
    found: dict[str, list[dict[str, Any]]] = {}

    for gang, (world_size, runs) in GANGS.items():
        of_gang = [(case, run) for case, run in cases if run in runs]
        if of_gang:
            run_gang(root, world_size, __file__, of_gang, gang)
            of_ranks = read_seen(root, world_size, gang)
            for run in of_ranks[0]:
                found[run] = [of_rank[run] for of_rank in of_ranks]

    return found


# --- exported without a process group


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_export(run: Path, *arguments: str) -> None:
    sys.argv = ["eopd", "export", str(run), *arguments]
    with pytest.raises(SystemExit) as done:
        main()

    assert done.value.code == 0


@every_run("1", "2", "1-2-3")
def test_an_exported_checkpoint_is_what_the_learner_exported_then(
    seen, root, case, run, monkeypatch, capfd
):
    monkeypatch.setattr(sys, "argv", [])
    directory = root / "runs" / f"{case.name}-{run}"
    config = {
        "run": {"name": "r", "batches": LAST},
        "student": {"model": str(root / case.family), "dtype": case.dtype},
        "teachers": [{"model": "t"}],
        "prompts": {"data": "a", "held_out": "b"},
        "flow": {"batch_prompts": 6},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    for checkpoint in (directory / "checkpoints").iterdir():
        write_manifest(checkpoint)

    newest = SAVED_AT if run == PASSED_ON else LAST
    run_export(directory, "--step", str(SAVED_AT), "--output", str(directory / "first"))
    run_export(directory)
    exported = {SAVED_AT: directory / "first", newest: directory / f"hf-step-{newest:06d}"}
    assert capfd.readouterr().out == f"{directory / 'first'}\n{directory}/hf-step-{newest:06d}\n"
    for step, found in exported.items():
        assert files_of(found) == files_of(directory / f"expected-{step}")


def test_an_export_that_fails_leaves_what_was_there(root, tmp_path):
    from eopd.learner.export import write_student
    from eopd.learner.student import load_student

    model = load_student(student_of(CASES[0], root), activation_checkpointing=False).model
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "older").touch()
    with pytest.raises((OSError, ValueError)):
        write_student(
            tmp_path / "hf",
            model,
            model.state_dict(),
            source=tmp_path / "no-tokenizer",
        )

    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert list(files_of(tmp_path / "hf")) == ["older"]
    write_student(tmp_path / "hf", model, model.state_dict(), source=root / "qwen3")
    assert "older" not in files_of(tmp_path / "hf")


# --- continued by another number of ranks


def require_close(
    actual: list[dict[str, float]], expected: list[dict[str, float]], case: Case
) -> None:
    # bfloat16 rounds otherwise in other packings and orders of summing
    exact = case.dtype == "float32"
    for metric, tolerance in {
        "eopd_loss": {"abs": 1e-4} if exact else {"rel": 0.01},
        "eopd_grad_norm": {"rel": 1e-4 if exact else 0.03},
        "eopd_learning_rate": {"abs": 0.0},
    }.items():
        assert [row[metric] for row in actual] == pytest.approx(
            [row[metric] for row in expected], **tolerance
        )


@every_run("1-2", "2-1", "2-3")
def test_another_number_of_ranks_goes_on_as_if_it_had_not_changed(seen, case, run):
    actual, expected = (
        seen[f"{case.name}-{name}"][0]["metrics"][SAVED_AT - LAST :] for name in (run, SOURCES[run])
    )
    require_close(actual, expected, case)


@every_run("1-1", "1-2-3-1")
def test_the_first_rank_goes_on_bit_equal(seen, case, run):
    assert (
        seen[f"{case.name}-{run}"][0]["metrics"] == seen[f"{case.name}-1"][0]["metrics"][SAVED_AT:]
    )
    assert seen[f"{case.name}-{run}"][0]["version"] == [run.count("-"), LAST]


@every_run(*(run for run, source in SOURCES.items() if source))
def test_the_loaded_weights_are_those_that_were_saved(seen, root, case, run):
    loaded, saved = (
        root / "runs" / f"{case.name}-{name}" / f"expected-{SAVED_AT}"
        for name in (run, SOURCES[run])
    )
    assert files_of(loaded) == files_of(saved)


@every_run(*(run for run, source in SOURCES.items() if source))
def test_new_ranks_take_the_random_states_of_old_ones_in_turn(seen, case, run):
    loaded = [rank["draw"] for rank in seen[f"{case.name}-{run}"]]
    saved = [rank["draw"] for rank in seen[f"{case.name}-{SOURCES[run]}"]]
    assert loaded == [saved[rank % len(saved)] for rank in range(len(loaded))]


def test_the_conversion_leaves_nothing_behind(seen, root):
    assert {path.name for path in root.glob("runs/*/checkpoints/*/*")} <= {
        "learner",
        "manifest.json",
    }


# --- offloaded


@every_run("1", "2", cases=OFFLOADED_CASES)
def test_offloaded_states_train_as_those_that_are_not(seen, root, case, run):
    saved = next((root / "runs" / f"{case.name}-{run}" / FIRST).glob("deepspeed/*_model_states.pt"))
    assert (
        torch.load(saved, weights_only=False)["ds_config"]["zero_optimization"].items()
        >= case.zero.items()
    )
    rows, rows_of_others = (
        seen[f"{name}-{run}"][0]["metrics"] for name in (case.name, f"{case.dtype}-{case.stage}")
    )
    require_close(rows, rows_of_others, case)


def test_what_torch_says_of_a_full_disk_becomes_an_oserror(tmp_path):
    from eopd.learner.deepspeed_backend import full_disk_is_an_oserror

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel takes the first part, as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    try:
        with (
            pytest.raises(
                OSError, match="torch could not write all of it; is the disk full"
            ) as full,
            full_disk_is_an_oserror(),
        ):
            torch.save(torch.zeros(100_000), tmp_path / "weights.pt")

        assert "free some space" in str(StorageError.of(tmp_path / "step-1", full.value, ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
