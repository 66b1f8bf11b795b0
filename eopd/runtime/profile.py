"""``eopd profile``: where the time of a run's steps goes, by actors of its own.

    stage by stage ──▶ what each stage costs alone ─┐
    the loop of ``train`` ──▶ rows of its steps ────┴─▶ telemetry/profile.py

Both train the student that the actors hold; nothing of it is kept. Where batches take long, fewer of
them are measured, so that the command takes about two minutes.
"""

import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from eopd.config import Config, TelemetryConfig
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline
from eopd.planning.stages import stage_by_stage
from eopd.preflight import Prepared, pinned, prepare
from eopd.preflight.environment import is_local
from eopd.roles import WorkerDownError
from eopd.run.progress import Progress
from eopd.run.record import Row
from eopd.runtime import cluster
from eopd.runtime.logs import collect
from eopd.runtime.placement import plan
from eopd.runtime.signals import caught, ignored_by_children
from eopd.runtime.supervisor import Workers, start_workers
from eopd.runtime.train import pipeline_of
from eopd.telemetry.profile import STAGES, Profile, summarise
from eopd.telemetry.step import step_row
from eopd.types import RunFailedError, StepDone

WARM_UP_ALONE: Final = 1  # batches; the first of everything compiles and allocates
ALONE: Final = (1, 2)  # at least, and where there is time
WARM_UP: Final = 2  # steps, until batches overlap as they will
STEPS: Final = (2, 5)
PATIENCE_S: Final = 110.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Patience:
    """How many steps are measured: at least, and at most where there is time, until ``until``."""

    steps: tuple[int, int]
    until: float

    def is_over(self, measured: int, wanted: tuple[int, int]) -> bool:
        """Returns whether as many are enough."""
        least, most = wanted
        return measured >= (most if time.monotonic() < self.until else least)


def profile(config: Config, *, steps: int | None, say: Say) -> Profile:
    """Measures some steps of the run that ``config`` describes, after a few that warm it up.

    The actors, the loop and the data are those of ``eopd train``. There is no evaluation, checkpoint,
    export, upload or tracker, and no run directory. The logs of the actors are in a folder of
    their own, which goes with them, unless the run has failed.

    Args:
        config: the run.
        steps: how many are measured; None for as many as there is time for.
        say: is told how far it is.

    Raises:
        ConfigError: the user's mistake, found before any worker starts.
        RunFailedError: the run did not work.
        KeyboardInterrupt: a signal has ended it.
    """
    patience = Patience((steps, steps) if steps else STEPS, time.monotonic() + PATIENCE_S)
    most = WARM_UP_ALONE + ALONE[1] + WARM_UP + patience.steps[1]
    config = pinned(config)
    with _folder() as folder:
        config = _without_outlets(config, folder, most)
        prepared = prepare(config)
        with ignored_by_children(), cluster.connect(config.cluster):
            cluster.require_room(plan(config), config.cluster, say)
            config.run.path.mkdir()
            try:
                return asyncio.run(_profile(config, prepared, patience, say))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None


def _without_outlets(config: Config, folder: Path, batches: int) -> Config:
    """Returns the config of the same run in another place, without what it writes elsewhere, and with
    at least so many batches.
    """
    changes = {"directory": folder, "upload": None, "batches": max(config.run.batches, batches)}
    telemetry = TelemetryConfig(port=None, log_format=config.telemetry.log_format)
    run = config.run.model_copy(update=changes)
    return config.model_copy(update={"run": run, "telemetry": telemetry})


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder for the logs, which stays where a run has failed: the error names it."""
    folder = Path(tempfile.mkdtemp(prefix="eopd-profile-"))
    try:
        yield folder
    except RunFailedError as error:
        if str(folder) in str(error):
            raise

        raise RunFailedError(f"{error}; its logs are in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)


async def _profile(config: Config, prepared: Prepared, patience: Patience, say: Say) -> Profile:
    with (
        caught(lambda number: False, asyncio.current_task()),
        collect(config.run.path / "logs", config.telemetry.log_format),
    ):
        say("starting the learner, the rollout engines and the teacher")
        try:
            async with start_workers(config, 0, prepared.train.prompts, say) as workers:
                await workers.channel.publish(await workers.learner.version())
                return await _measure(config, prepared, workers, patience, say)
        except WorkerDownError as error:
            raise RunFailedError(f"a worker was lost: {error}") from error


async def _measure(
    config: Config, prepared: Prepared, workers: Workers, patience: Patience, say: Say
) -> Profile:
    """Trains some batches stage by stage, and then goes on with the loop of a run."""
    ledger, progress = Ledger(), Progress()

    def begin() -> Pipeline:
        return pipeline_of(
            config,
            prepared,
            workers,
            ledger,
            progress,
            lambda issue, lost: say(f"gave up {lost.key}: {lost.reason.value}: {lost.detail}"),
        )

    alone_s, cpu_alone_s = await _alone(begin(), patience, say)
    trained = (await workers.learner.version()).step
    rows, wall_s, cpu_s = await _overlapped(begin().steps(trained), patience, say)
    return summarise(
        rows,
        alone_s,
        wall_s=wall_s,
        cpu_s=(cpu_alone_s, cpu_s) if is_local(config.cluster) else None,
        cores=len(os.sched_getaffinity(0)),
    )


async def _alone(line: Pipeline, patience: Patience, say: Say) -> tuple[Mapping[str, float], float]:
    """Trains batches stage by stage, after some that warm everything up; returns the mean seconds of
    every stage, and of CPU work on this machine.
    """
    batches, before_s = list[Mapping[str, float]](), 0.0
    while not patience.is_over(len(batches) - WARM_UP_ALONE, ALONE):
        if len(batches) == WARM_UP_ALONE:
            before_s = cpu_seconds(os.getpid())

        seconds, _ = await stage_by_stage(line, len(batches))
        batches.append(seconds)
        say(f"stage by stage: batch {len(batches)}, {_words(batches[-1])}")

    cpu_s, measured = cpu_seconds(os.getpid()) - before_s, batches[WARM_UP_ALONE:]
    means = {stage: statistics.fmean(spent[stage] for spent in measured) for stage in STAGES}
    return means, cpu_s / len(measured)


async def _overlapped(
    steps: AsyncGenerator[StepDone, None], patience: Patience, say: Say
) -> tuple[Sequence[Row], float, float]:
    """Runs the loop as ``train`` does; returns the rows of its steps after the warm-up, their wall
    seconds, and the mean seconds of CPU work on this machine.
    """
    rows: list[Row] = []
    started = before_s = 0.0

    async with aclosing(steps) as done_steps:
        async for done in done_steps:
            rows.append(step_row(done))
            say(f"as a run: step {len(rows)}, {done.seconds['step']:.2f} s")
            if len(rows) == WARM_UP:
                started, before_s = time.monotonic(), cpu_seconds(os.getpid())

            if patience.is_over(len(rows) - WARM_UP, patience.steps):
                break

        wall_s, cpu_s = time.monotonic() - started, cpu_seconds(os.getpid()) - before_s

    measured = rows[WARM_UP:]
    return measured, wall_s, cpu_s / len(measured)


def _words(spent: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {spent[stage]:.2f} s" for stage in STAGES)


def cpu_seconds(root: int) -> float:
    """Returns the CPU seconds so far of a process and all that descend from it, those included that
    have ended and were waited for.
    """
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:4])

    return total
