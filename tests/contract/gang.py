"""Shared by the learner's contract tests: tiny models, made-up trajectories, and the launch of one process per rank."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from eopd.models.tiny import Family, build_model, train_tokenizer, write_model
from eopd.types import (
    Exact,
    Header,
    PromptSample,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

VOCABULARY, TOP_K = 280, 4  # the vocabulary of the tokenizer, checked where it is trained


def scored_trajectory(
    rng: np.random.Generator,
    *,
    epoch: int,
    index: int,
    prompt_length: int,
    loss_mask: npt.NDArray[np.bool_],
    sharpness: npt.NDArray[np.float64] | float,
    vocabulary: int = VOCABULARY,
) -> ScoredTrajectory:
    """Random tokens under a random teacher, whose logits are scaled by ``sharpness`` [R, 1]."""
    length = len(loss_mask)
    logprobs = torch.from_numpy(rng.normal(size=(length, vocabulary)) * sharpness).log_softmax(-1)
    top = logprobs.topk(TOP_K)
    response = rng.integers(0, vocabulary, length)
    rest = logprobs.scatter(1, top.indices, -torch.inf)
    return ScoredTrajectory(
        trajectory=Trajectory(
            prompt=PromptSample(
                epoch=epoch,
                prompt_id=f"prompt-{index}",
                source="test",
                token_ids=rng.integers(0, vocabulary, prompt_length).astype(np.int32),
                reference_answer=None,
            ),
            sample_index=0,
            response_ids=response.astype(np.int32),
            loss_mask=loss_mask,
            rollout_logprobs=(rng.normal(size=length) * 0.3 - math.log(vocabulary)).astype(np.float32),
            policy_versions=np.zeros(length, np.int32),
            stop_reason=StopReason.LENGTH,
        ),
        signal=TeacherSignal(
            teacher="teacher",
            token_logprobs=logprobs.numpy()[np.arange(length), response].astype(np.float32),
            entropy=Exact(-(logprobs.exp() * logprobs).sum(-1).float().numpy()),
            topk_ids=top.indices.int().numpy(),
            topk_logprobs=top.values.float().numpy(),
            tail_logprobs=rest.logsumexp(-1).float().numpy(),
        ),
    )


def store(scored: ScoredTrajectory) -> Stored[ScoredTrajectory]:
    trajectory = scored.trajectory
    return Stored(Header.of(trajectory, {}), scored)


def write_models(root: Path, *families: Family, vocabulary: int = VOCABULARY, **shape: int) -> Path:
    """One tiny model per family under ``root``, which is returned."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 3], vocabulary)
    assert len(tokenizer) == vocabulary
    for family in families:
        write_model(root / family, build_model(family, tokenizer, seed=3, scale=0.1, **shape), tokenizer)
    return root


def run_gang(directory: Path, world_size: int, program: str, *name: str) -> None:
    """Run ``python PROGRAM RANK WORLD_SIZE PORT DIRECTORY [NAME]`` for every rank; wait until all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (directory / f"log-{'-'.join([*name, str(world_size)])}").open("w+") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, program, str(rank), str(world_size), str(port), str(directory), *name],
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


def run_as_rank(run_rank: Callable[..., None]) -> NoReturn:
    """Call ``run_rank(rank, world_size, port, directory, *name)`` with this process's arguments, and end it."""
    rank, world_size, port, directory, *name = sys.argv[1:]
    run_rank(int(rank), int(world_size), int(port), Path(directory), *name)
    sys.stdout.flush()
    os._exit(0)  # torch's threads sometimes abort the interpreter while it is being torn down


def read_seen(directory: Path, world_size: int, name: str | None = None) -> list[dict[str, Any]]:
    """What every rank wrote to ``seen-NAME-RANK.json``; the name is the world size where there is no other."""
    return [
        json.loads((directory / f"seen-{name or world_size}-{rank}.json").read_text()) for rank in range(world_size)
    ]
