"""Shared by the learner's contract tests: tiny models, made-up trajectories, and the launch
of one process per rank.
"""

import gc
import importlib
import json
import math
import os
import socket
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import fakes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from processes import FORKED

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.learner.learner import LearnerRank
from eopd.models.tiny import Family, build_model, train_tokenizer, write_model
from eopd.types import (
    Exact,
    Header,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
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
        trajectory=fakes.trajectory(
            response,
            of=fakes.prompt(
                f"prompt-{index}",
                rng.integers(0, vocabulary, prompt_length),
                epoch=epoch,
                source="test",
            ),
            mask=loss_mask,
            logprobs=rng.normal(size=length) * 0.3 - math.log(vocabulary),
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
    return Stored(Header.of(scored.trajectory, {}), scored)


def start_learner(
    student: StudentConfig,
    config: LearnerConfig,
    loss: LossConfig,
    *,
    root: Path,
    rank: int,
    world_size: int,
    port: int,
    total_batches: int,
    seed: int,
    temperature: float = 1.0,
) -> LearnerRank:
    """A rank's learner on DeepSpeed; what is broken is written below ``root``."""
    from eopd.learner.deepspeed_backend import DeepspeedBackend

    return LearnerRank(
        DeepspeedBackend,
        student,
        config,
        loss,
        temperature=temperature,
        total_batches=total_batches,
        seed=seed,
        entropy_bounds={"teacher": "mid"},
        broken=root / "broken",
        rank=rank,
        world_size=world_size,
        master_address="127.0.0.1",
        master_port=port,
    )


def write_models(root: Path, *families: Family, vocabulary: int = VOCABULARY, **shape: int) -> Path:
    """One tiny model per family under ``root``, which is returned."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 3], vocabulary)
    assert len(tokenizer) == vocabulary

    for family in families:
        write_model(
            root / family,
            build_model(family, tokenizer, seed=3, scale=0.1, **shape),
            tokenizer,
        )

    return root


def asked_for(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """What these parameters are in the module's selected tests, each once: a gang runs no
    case besides.
    """
    found: list[tuple[Any, ...]] = []
    for item in request.session.items:
        if getattr(item, "module", None) is request.module and hasattr(item, "callspec"):
            values = item.callspec.params
            case = tuple(values.get(name) for name in names)
            if values.keys() >= set(names) and case not in found:
                found.append(case)

    return found


def run_gang(
    directory: Path, world_size: int, program: str, cases: Sequence[Any], *name: str
) -> None:
    """Call ``run_rank(rank, world_size, port, directory, cases, *name)`` of a test's file in a
    process per rank, and wait until all have ended well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    log = directory / f"log-{'-'.join([*name, str(world_size)])}"
    shared = (world_size, port, directory, cases, *name)
    ranks = [
        FORKED.Process(target=_be_rank, args=(log, program, rank, *shared))
        for rank in range(world_size)
    ]

    try:
        for rank in ranks:
            rank.start()

        for rank in ranks:
            rank.join(timeout=480)

        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()

    assert codes == [0] * world_size, log.read_text()[-5000:]


def _be_rank(log: Path, program: str, *arguments: Any) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)

    code = 1
    gc.freeze()  # what was imported stays: DeepSpeed's collections need not look at it

    try:
        importlib.import_module(Path(program).stem).run_rank(*arguments)
        code = 0
    finally:
        if code:
            traceback.print_exc()

        sys.stdout.flush()
        sys.stderr.flush()
        # torch's threads sometimes abort the interpreter while it is being torn down
        os._exit(code)


def run_gangs(directory: Path, program: str, cases: Iterable[tuple[Any, ...]]) -> Iterable[int]:
    """Run one gang per number of ranks, all at once; these numbers, which are the last
    entries of the cases.
    """
    of_sizes: dict[int, list[Any]] = defaultdict(list)
    for *case, world_size in cases:
        of_sizes[world_size].append(case)

    with ThreadPoolExecutor() as gangs:
        list(
            gangs.map(
                lambda size: run_gang(
                    directory,
                    size,
                    program,
                    of_sizes[size],
                ),
                of_sizes,
            )
        )

    return of_sizes


def read_seen(directory: Path, world_size: int, name: str | None = None) -> list[dict[str, Any]]:
    """What every rank wrote to ``seen-NAME-RANK.json``; the name is the world size where
    there is no other.
    """
    return [
        json.loads((directory / f"seen-{name or world_size}-{rank}.json").read_text())
        for rank in range(world_size)
    ]
