"""Checkpoints of the learner on real DeepSpeed: exported without it.

This file is also the program of a rank: ``python test_checkpoints.py RANK WORLD_SIZE PORT DIRECTORY``.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from eopd.cli.main import main
from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.types import (
    Exact,
    Header,
    OptimizerStep,
    PackedBatch,
    PromptSample,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

VOCABULARY, TOP_K = 277, 4  # no size of the model is a multiple of three: shards are padded
SAVED_AT, LAST = 2, 7  # batches: a checkpoint after each, and five steps between


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint."""

    family: str
    dtype: str
    stage: int
    native: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.stage}"


# Stage 3 as a large model has it: several groups of parameters, some parameters sharded, some not.
SEVERAL_GROUPS = {"zero_optimization": {"sub_group_size": 20_000, "stage3_param_persistence_threshold": 1_000}}
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


def student_of(case: Case, root: Path) -> StudentConfig:
    return StudentConfig(model=root / case.family, dtype=case.dtype)


def make_batch(number: int, world_size: int) -> PackedBatch:
    """Six trajectories, one micro-batch a rank."""
    rng = np.random.default_rng(number)
    stored = [make_stored(rng, number, index) for index in range(6)]
    ranks = tuple((tuple(stored[rank::world_size]),) for rank in range(world_size))
    return PackedBatch(
        steps=(OptimizerStep(num_loss_tokens=sum(s.header.num_loss_tokens for s in stored), ranks=ranks),), alpha=1.0
    )


def make_stored(rng: np.random.Generator, number: int, index: int) -> Stored[ScoredTrajectory]:
    length = int(rng.integers(3, 9))
    logprobs = torch.from_numpy(rng.normal(size=(length, VOCABULARY)) * 3.0).log_softmax(-1)
    top = logprobs.topk(TOP_K)
    response = rng.integers(0, VOCABULARY, length).astype(np.int32)
    prompt = PromptSample(
        epoch=number,
        prompt_id=f"prompt-{index}",
        source="test",
        token_ids=rng.integers(0, VOCABULARY, 4).astype(np.int32),
        reference_answer=None,
    )
    trajectory = Trajectory(
        prompt=prompt,
        sample_index=0,
        response_ids=response,
        loss_mask=np.ones(length, bool),
        rollout_logprobs=np.full(length, -np.log(VOCABULARY), np.float32),
        policy_versions=np.zeros(length, np.int32),
        stop_reason=StopReason.LENGTH,
    )
    signal = TeacherSignal(
        teacher="teacher",
        token_logprobs=logprobs.numpy()[np.arange(length), response].astype(np.float32),
        entropy=Exact(-(logprobs.exp() * logprobs).sum(-1).float().numpy()),
        topk_ids=top.indices.int().numpy(),
        topk_logprobs=top.values.float().numpy(),
        tail_logprobs=np.log1p(-top.values.exp().sum(-1).numpy()).astype(np.float32),
    )
    header = Header(
        key=trajectory.key,
        source="test",
        num_prompt_tokens=4,
        num_response_tokens=length,
        num_loss_tokens=length,
        stop_reason=trajectory.stop_reason,
        oldest_version=0,
        newest_version=0,
        sums={},
    )
    return Stored(header, ScoredTrajectory(trajectory=trajectory, signal=signal))


# ---- the program of a rank ---------------------------------------------------------------------------------


def run_rank(rank: int, world_size: int, port: int, root: Path) -> None:
    from eopd.learner.learner import LearnerRank

    def learner_of(case: Case) -> LearnerRank:
        return LearnerRank(
            student_of(case, root),
            LearnerConfig(
                lr=3e-3,
                weight_decay=0.1,
                schedule="cosine",
                warmup_batches=4,
                zero_stage=case.stage,
                logit_chunk_tokens=16,
                deepspeed=case.native,
            ),
            LossConfig(top_k=TOP_K),
            temperature=1.0,
            total_batches=LAST + 3,
            seed=7,
            rank=rank,
            world_size=world_size,
            master_address="127.0.0.1",
            master_port=port,
        )

    def train(learner: LearnerRank, first: int, last: int) -> list[dict[str, float]]:
        return [dict(learner.step(make_batch(n, world_size).share(rank)).metrics) for n in range(first, last)]

    seen: dict[str, list[dict[str, float]]] = {}
    for case in CASES:
        run, learner = run_of(root, case, world_size), learner_of(case)
        for first, last in ((0, SAVED_AT), (SAVED_AT, LAST)):
            seen[f"{case.name} {last}"] = train(learner, first, last)
            learner.save(run / f"checkpoints/step-{last:06d}/learner")
            learner.export(run / f"expected-{last}")
    (root / f"seen-{world_size}-{rank}.json").write_text(json.dumps(seen))


def run_of(root: Path, case: Case, world_size: int) -> Path:
    return root / "runs" / f"{case.name}-{world_size}"


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)  # torch's threads sometimes abort the interpreter while it is being torn down


def run_gang(root: Path, world_size: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (root / f"log-{world_size}").open("w+") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world_size), str(port), str(root)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]
        try:
            codes = [rank.wait(timeout=240) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        log.seek(0)
        assert codes == [0] * world_size, log.read()[-5000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the runs of every case under one and two ranks."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 3], VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    for family in ("qwen3", "llama"):
        write_model(root / family, build_model(family, tokenizer, seed=3, hidden=62, scale=0.1), tokenizer)
    for world_size in (1, 2):
        run_gang(root, world_size)
    return root


# ---- exported without a process group ----------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_export(run: Path, *arguments: str) -> None:
    sys.argv = ["eopd", "export", str(run), *arguments]
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_exported_checkpoint_is_what_the_learner_exported_then(root, case, world_size, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [])
    run = run_of(root, case, world_size)
    config = {
        "run": {"name": "r", "batches": LAST},
        "student": {"model": str(root / case.family), "dtype": case.dtype},
        "teachers": [{"model": "t"}],
        "prompts": {"data": "a", "held_out": "b"},
        "flow": {"batch_prompts": 6},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    run_export(run, "--step", str(SAVED_AT), "--output", str(run / "early"))
    run_export(run)
    early, newest = run / "early", run / f"hf-step-{LAST:06d}"
    assert capfd.readouterr().out == f"{early}\n{newest}\n"
    assert files_of(early) == files_of(run / f"expected-{SAVED_AT}")
    assert files_of(newest) == files_of(run / f"expected-{LAST}")
    assert files_of(early)["model.safetensors"] != files_of(newest)["model.safetensors"]


def test_an_export_that_fails_leaves_what_was_there(root, tmp_path):
    from eopd.learner.export import write_student
    from eopd.learner.student import load_student

    model = load_student(student_of(CASES[0], root), activation_checkpointing=False).model
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "older").touch()
    with pytest.raises((OSError, ValueError)):
        write_student(tmp_path / "hf", model, model.state_dict(), source=tmp_path / "no-tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert list(files_of(tmp_path / "hf")) == ["older"]
    write_student(tmp_path / "hf", model, model.state_dict(), source=root / "qwen3")
    assert "older" not in files_of(tmp_path / "hf")
