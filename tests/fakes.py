"""What tests make up: prompts, trajectories and their headers, a world that plays every role
of the loop, and the files of a run.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eopd.ledger import Ledger, Watermark
from eopd.pipeline import Pipeline, Plan
from eopd.prompts import PromptOrder
from eopd.run.checkpoint import DriverState, write_checkpoint
from eopd.run.progress import Progress
from eopd.telemetry.step import ledger_row, step_row
from eopd.types import (
    Bounds,
    Exact,
    Header,
    LearnerStats,
    LostReason,
    LostTrajectory,
    PackedBatch,
    PolicyVersion,
    PromptSample,
    PublishStats,
    Sampling,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
    TrajectoryKey,
)


def prompt(
    prompt_id: str = "p",
    token_ids: Sequence[int] = (5, 6),
    *,
    epoch: int = 0,
    source: str = "s",
    answer: str | None = None,
    for_teacher: Sequence[int] | None = None,
    row: Mapping[str, object] | None = None,
) -> PromptSample:
    return PromptSample(
        epoch=epoch,
        prompt_id=prompt_id,
        source=source,
        token_ids=np.array(token_ids, np.int32),
        reference_answer=answer,
        teacher_token_ids=None if for_teacher is None else np.array(for_teacher, np.int32),
        row=row,
    )


def trajectory(
    response_ids: Sequence[int],
    *,
    of: PromptSample | None = None,
    sample_index: int = 0,
    mask: Sequence[bool] | None = None,
    logprobs: Sequence[float] | None = None,
    version: int = 0,
    stop: StopReason = StopReason.LENGTH,
) -> Trajectory:
    """A response to ``of``, all of it written under one version."""
    size = len(response_ids)
    return Trajectory(
        prompt=prompt() if of is None else of,
        sample_index=sample_index,
        response_ids=np.array(response_ids, np.int32),
        loss_mask=np.ones(size, np.bool_) if mask is None else np.array(mask, np.bool_),
        rollout_logprobs=np.zeros(size, np.float32)
        if logprobs is None
        else np.array(logprobs, np.float32),
        policy_versions=np.full(size, version, np.int32),
        stop_reason=stop,
    )


WORDS = {0: "<end>", 1: "\u2581the", 2: "\u2581sea", 3: "s"}


class Strips:
    """A tokenizer whose words begin with a space that is lost where the text begins."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        words = [WORDS[int(i)] for i in ids if int(i) or not skip_special_tokens]
        return "".join(words).replace("\u2581", " ").removeprefix(" ")


def scored(entropy: Exact | Bounds) -> ScoredTrajectory:
    """Three tokens, of which the second does not enter the loss, and two candidates for each."""
    floats = np.array([-0.5, -1.25, -np.inf], np.float32)
    body = trajectory(
        [1, 2, 0], mask=[True, False, True], logprobs=floats[::-1], stop=StopReason.END_TOKEN
    )
    signal = TeacherSignal(
        teacher="t",
        token_logprobs=floats,
        entropy=entropy,
        topk_ids=np.array([[1, 3], [1, 2], [0, 1]], np.int32),
        topk_logprobs=np.array([[-0.5, -2.0], [-0.25, -np.inf], [-0.1, -3.0]], np.float32),
        tail_logprobs=floats,
    )
    return ScoredTrajectory(trajectory=body, signal=signal)


def stored(body: Trajectory, sums: Mapping[str, float] | None = None) -> Stored[Trajectory]:
    return Stored(Header.of(body, sums or {}), body)


def header(
    prompt_id: str = "p",
    *,
    epoch: int = 0,
    sample_index: int = 0,
    source: str = "s",
    num_prompt: int = 2,
    num_response: int = 4,
    oldest: int = 0,
    newest: int | None = None,
    crc32: int = 0,
) -> Header:
    """The header of a trajectory that is not there; all its response tokens are loss tokens."""
    return Header(
        key=TrajectoryKey(epoch, prompt_id, sample_index),
        source=source,
        num_prompt_tokens=num_prompt,
        num_response_tokens=num_response,
        num_loss_tokens=num_response,
        stop_reason=StopReason.LENGTH,
        oldest_version=oldest,
        newest_version=oldest if newest is None else newest,
        response_crc32=crc32,
        sums={},
    )


def lost(
    of: PromptSample,
    sample_index: int = 0,
    *,
    reason: LostReason = LostReason.ROLLOUT_FAILED,
    detail: str = "fake",
) -> LostTrajectory:
    return LostTrajectory(
        key=TrajectoryKey(of.epoch, of.prompt_id, sample_index),
        reason=reason,
        detail=detail,
    )


class World:
    """Engine, teacher, learner and channel in one, which all answer at once. Tests make it
    slow or lossy.
    """

    def __init__(self) -> None:
        self.served = self.version = 0
        self.parts: list[PackedBatch] = []  # accumulated, and not yet stepped on

    def write(
        self, of: PromptSample, sample_index: int, version: int, body: object = None
    ) -> Stored[Trajectory]:
        """The answer of an engine that served ``version`` when it was asked."""
        key = {"epoch": of.epoch, "sample_index": sample_index, "source": of.source}
        return Stored(
            header(
                of.prompt_id,
                **key,
                oldest=version,
            ),
            body,
        )  # type: ignore[arg-type]

    async def generate(self, of: PromptSample, sample_index: int, sampling: Sampling) -> object:
        return self.write(of, sample_index, self.served)

    async def score(self, stored: Stored[Trajectory]) -> object:
        return stored

    async def accumulate(self, part: PackedBatch) -> None:
        self.parts.append(part)

    def whole(self, batch: PackedBatch) -> list[Stored[ScoredTrajectory]]:
        """The trajectories of a batch of which ``batch`` is the last part."""
        return [stored for part in (*self.parts, batch) for stored in part.stored()]

    async def step(self, batch: PackedBatch) -> LearnerStats:
        self.parts = []
        self.version += 1
        return LearnerStats(version=PolicyVersion(0, self.version), metrics={"eopd_loss": 1.0})

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        on_sent()
        self.served = version.step
        return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)


def order(
    *, prompts: int = 5, samples: int = 2, turns: tuple[int, int] | None = None
) -> PromptOrder:
    """``prompts`` prompts named by their number, ``samples`` responses each. With ``turns`` the
    first two prompts are a part of their own.
    """
    all_of_them = [prompt(f"{i}") for i in range(prompts)]
    return PromptOrder(
        all_of_them,
        samples_per_prompt=samples,
        seed=3,
        parts=[all_of_them[:2], all_of_them[2:]],
        turns=turns,
    )


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what comes soon, on a busy machine too."""
    async with asyncio.timeout(20.0):
        while not condition():
            await asyncio.sleep(0.005)


def pipeline(
    world: World,
    *,
    of: PromptOrder | None = None,
    ledger: Ledger | None = None,
    on_drop: Callable[[int, LostTrajectory], None] = lambda issue, lost: None,
    clock: Callable[[], float] = time.monotonic,
    **plan: object,
) -> Pipeline:
    """The loop on a world: four trajectories a batch, two ranks, and what else ``plan`` says
    of ``Plan``.
    """
    settings: dict[str, object] = {
        "batch": 4,
        "batches": 12,
        "max_staleness": 0,
        "lookahead": 0,
        "max_attempts": 3,
        "max_dropped": 0,
        "temperature": 1.0,
        "max_response_tokens": 4,
        "ranks": 2,
        "optimizer_steps": 1,
        "token_budget": 24,
        "streams": True,
        "alpha_at": lambda batch: 1.0,
    }
    return Pipeline(
        Plan(**settings | plan),  # type: ignore[arg-type]
        world,
        world,
        world,
        world,
        of or order(),
        ledger or Ledger(),
        Progress(),
        on_drop,
        clock=clock,
    )


async def rows(line: Pipeline, start: int = 0) -> AsyncIterator[dict[str, float]]:
    """Run a loop; the row of each step."""
    async for done in line.steps(start):
        yield {**step_row(done), **line.progress.row(), **ledger_row(line.ledger)}


def driver_state(
    step: int, *, per_step: int = 1, inputs: Mapping[str, str] | None = None
) -> DriverState:
    """The driver's part of a checkpoint, with ``per_step`` trajectories settled by each step."""
    return DriverState(
        step=step,
        tokens=3,
        trajectories=2,
        skipped_steps=1,
        wall_s=1.5,
        ledger=Ledger(Watermark(per_step * step)).state(),
        inputs=inputs,
    )


async def save_weights(directory: Path) -> None:
    """The learner's part of a checkpoint: one file of one byte."""
    directory.mkdir()
    (directory / "weights").write_text("w")


async def save_checkpoint(directory: Path, state: DriverState, *, keep_last: int = 9) -> Path:
    """Write a whole checkpoint into a directory of checkpoints."""
    return await write_checkpoint(directory, state, save_weights, keep_last=keep_last)


def write_config(
    directory: Path,
    *,
    batches: int = 2,
    student: str = "{model: s}",
    teachers: str = "[{model: t}]",
    prompts: str = "{data: a, held_out: b}",
    flow: str = "{batch_prompts: 8}",
    more: str = "",
) -> Path:
    """Write ``c.yaml``, the config of a run below ``directory``. Sections are given as YAML."""
    file = directory / "c.yaml"
    file.write_text(
        f"run: {{name: r, batches: {batches}, directory: {directory}/runs}}\n"
        f"student: {student}\n"
        f"teachers: {teachers}\n"
        f"prompts: {prompts}\n"
        f"flow: {flow}\n"
        f"{more}"
    )
    return file


def write_whole_config(directory: Path, model: Path, **rest: Any) -> Path:
    """Write the config of a run whose model, student and teacher in one, and prompts are there."""
    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a few words"}) + "\n")
    return write_config(
        directory,
        student=f"{{model: {model}}}",
        teachers=f"[{{model: {model}}}]",
        prompts=f"{{data: {rows}, held_out: {rows}}}",
        **rest,
    )


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON-lines file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
