"""Shared by the learner's contract tests: made-up trajectories, and the launch of one process per rank."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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
    sharpness: npt.NDArray[np.float64],
) -> ScoredTrajectory:
    """Random tokens under a random teacher, whose logits are scaled by ``sharpness`` [R, 1]."""
    length = len(loss_mask)
    logprobs = torch.from_numpy(rng.normal(size=(length, VOCABULARY)) * sharpness).log_softmax(-1)
    top = logprobs.topk(TOP_K)
    response = rng.integers(0, VOCABULARY, length)
    rest = logprobs.scatter(1, top.indices, -torch.inf)
    return ScoredTrajectory(
        trajectory=Trajectory(
            prompt=PromptSample(
                epoch=epoch,
                prompt_id=f"prompt-{index}",
                source="test",
                token_ids=rng.integers(0, VOCABULARY, prompt_length).astype(np.int32),
                reference_answer=None,
            ),
            sample_index=0,
            response_ids=response.astype(np.int32),
            loss_mask=loss_mask,
            rollout_logprobs=(rng.normal(size=length) * 0.3 - math.log(VOCABULARY)).astype(np.float32),
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
    header = Header(
        key=trajectory.key,
        source="test",
        num_prompt_tokens=trajectory.prompt.token_ids.size,
        num_response_tokens=trajectory.response_ids.size,
        num_loss_tokens=int(trajectory.loss_mask.sum()),
        stop_reason=trajectory.stop_reason,
        oldest_version=0,
        newest_version=0,
        sums={},
    )
    return Stored(header, scored)


def run_gang(directory: Path, world_size: int, program: str) -> None:
    """Run ``python PROGRAM RANK WORLD_SIZE PORT DIRECTORY`` for every rank, and wait until all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (directory / f"log-{world_size}").open("w+")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(world_size), str(port), str(directory)],
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
    log.close()


def read_seen(directory: Path, world_size: int) -> list[dict[str, Any]]:
    """What every rank wrote to ``seen-WORLD_SIZE-RANK.json``."""
    return [json.loads((directory / f"seen-{world_size}-{rank}.json").read_text()) for rank in range(world_size)]
