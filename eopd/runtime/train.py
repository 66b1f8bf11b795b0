"""One training run from config to summary: check, start, measure, train, measure again, export."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Never

import numpy as np

from eopd.config import Config
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline
from eopd.preflight import Prepared, prepare
from eopd.preflight import notes as notes_on
from eopd.roles import LearnerDownError
from eopd.run.checkpoint import DriverState, StorageError, list_checkpoints, write_checkpoint
from eopd.run.directory import RunDirectory
from eopd.run.lock import held
from eopd.run.progress import Progress, first_line
from eopd.run.record import Row, Summary, held_out_record
from eopd.runtime import cluster, engines
from eopd.runtime.inputs import digests
from eopd.runtime.logs import collect, logger
from eopd.runtime.loop import make_pipeline
from eopd.runtime.measurement import keep_samples, measure_held_out
from eopd.runtime.placement import plan
from eopd.runtime.resume import Resume, TakenUp, take_up
from eopd.runtime.signals import caught, ignored_by_children
from eopd.runtime.sinks import open_sinks
from eopd.runtime.supervisor import Crew, crew
from eopd.runtime.teachers import self_test_replicas
from eopd.runtime.watchdog import Watchdog, with_background
from eopd.telemetry import trackers
from eopd.telemetry.console import Console
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.report.page import report_of_ended
from eopd.telemetry.sinks import Telemetry
from eopd.telemetry.step import config_row, step_row
from eopd.types import LostTrajectory, RunFailedError, StepDone

_STATE_S = 5.0  # how often Prometheus sees who is up
_PROBE_TOKENS = 256  # of prompts, which the student finds probable


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. ``trained`` is false where it was complete already, and nothing was
    done.
    """

    summary: Summary
    directory: RunDirectory
    trained: bool = True


def train(config: Config, *, resume: Resume = "no", step: int | None = None) -> Outcome:
    """Run (or continue) what ``config`` describes, as the only process that does.

    Args:
        config: the run.
        resume: whether it goes on from a checkpoint; see ``runtime/resume.py``.
        step: of that checkpoint; else the newest that is whole.

    Returns:
        The outcome; the summary's ``status`` is ``completed``, or ``interrupted`` after a signal
        that asked for it.

    Raises:
        ConfigError: the user's mistake, found before any worker starts.
    """
    prepared = prepare(config)
    directory = RunDirectory(config.run.path)

    with ExitStack() as stack:
        lock_notes = stack.enter_context(held(directory.path))
        taken_up = take_up(config, digests(config, prepared), resume, step)
        if taken_up.complete:
            assert taken_up.summary is not None
            return Outcome(taken_up.summary, directory, trained=False)

        with ignored_by_children():
            stack.enter_context(cluster.connect(config.cluster))

        cluster.require_room(plan(config))
        taken_up.begin()
        return Outcome(asyncio.run(TrainingRun(prepared, taken_up, lock_notes).main()), directory)


class TrainingRun:
    """One process's part of a run: all of it, or from a checkpoint on."""

    def __init__(self, prepared: Prepared, taken_up: TakenUp, notes: Sequence[str] = ()) -> None:
        self.directory = taken_up.directory
        self._config = taken_up.config
        self._prepared = prepared
        self._taken_up = taken_up
        # whether what it continues from has been put into effect
        self._gone_on = taken_up.checkpoint is None
        self._notes = [*notes, *taken_up.notes]
        state, summary = taken_up.state, taken_up.summary
        self._progress = Progress.resume(state, summary) if state and summary else Progress()
        self._progress.config_changes = taken_up.total_changes
        self._ledger = self._ledger_of(state)
        self._interrupted = False
        self._stop_softly: Callable[[], Coroutine[object, object, None]] | None = None
        self._pipeline: Pipeline | None = None
        self._trackers: list[trackers.BackgroundSink] = []
        self._prometheus: PrometheusSink | None = None

    async def main(self) -> Summary:
        """Run, and write the status whatever happens."""
        status: trackers.Status = "failed"
        try:
            with (
                caught(self._interrupt, asyncio.current_task()),
                collect(self.directory.logs, self._config.telemetry.log_format),
            ):
                async with self._telemetry() as telemetry:
                    await self._run(telemetry)

            status = "interrupted" if self._interrupted else "completed"
        except asyncio.CancelledError:
            status = "interrupted"
            if not self._interrupted:
                raise
        finally:
            summary = self._progress.summary(status)
            if self._gone_on:  # else the run stands as it stood
                self.directory.write_summary(summary)

            report_of_ended(self.directory.path, self.directory.report)
            trackers.end(self._trackers, status)

        return summary

    def _say(self, text: str) -> None:
        self._console.message(text)
        logger.info(text)

    async def _run(self, telemetry: Telemetry) -> None:
        self._say("starting the learner, the rollout engines and the teacher")
        text = np.concatenate(
            [prompt.token_ids for prompt in self._prepared.train.prompts[:_PROBE_TOKENS]]
        )

        async with crew(
            self._config, self._progress.incarnation, text[:_PROBE_TOKENS], self._say
        ) as members:
            run = self._config.run
            self._watchdog = Watchdog(
                run.stall_after_s, run.on_stall, lambda: self._report(members)
            )
            await with_background(
                self._outlive_learners(members, telemetry),
                self._watchdog.watch(self._say),
                engines.scale_on_request(self.directory, members.engine_fleet, self._say),
                self._show_state(members),
            )

    def _report(self, members: Crew) -> list[str]:
        """Who waits for whom."""
        loop = "not training" if self._pipeline is None else self._pipeline.status()
        return [
            f"loop: {loop}",
            f"weights: {members.channel.status()}",
            *members.engines.status(),
            *members.teacher.status(),
        ]

    async def _outlive_learners(self, members: Crew, telemetry: Telemetry) -> None:
        """The whole run; from the newest checkpoint on, under a new incarnation, whenever the
        learner is lost.
        """
        for report in await self_test_replicas(
            self._config, members.teacher_fleets, self._prepared.train.prompts[0].token_ids
        ):
            self._say(report.verdict)
            logger.info(str(report))

        lost: LearnerDownError | None = None

        while True:
            try:
                if lost is not None:
                    await self._restart_learner(members, lost)

                await self._from_checkpoint_to_end(members, telemetry)
                return
            except LearnerDownError as error:
                # a signal reaches the ranks too: the newest checkpoint stands
                if self._interrupted:
                    return

                lost = error
                members.restarts.count_loss(f"learner: {error}")

    async def _from_checkpoint_to_end(self, members: Crew, telemetry: Telemetry) -> None:
        if (checkpoint := self._checkpoint()) is not None:
            await members.learner.load(checkpoint / "learner")

        await members.channel.publish(await members.learner.version())
        self._go_on()
        if self._progress.before is None and self._progress.step == 0:
            await self._measure(members, "before")

        await self._train(members, telemetry)
        if not self._interrupted:
            await self._measure(members, "after")

        await members.learner.export(self.directory.hf)

    def _checkpoint(self) -> Path | None:
        """What a learner starts from."""
        if not self._gone_on:
            return self._taken_up.checkpoint

        return next(reversed(list_checkpoints(self.directory.checkpoints)), None)

    def _go_on(self) -> None:
        """The run is about to go on from its checkpoint: from here on that cannot be taken back."""
        if not self._gone_on:
            self._taken_up.carry_out()
            self._gone_on = True
            self.directory.write_summary(self._progress.summary("running"))

    async def _restart_learner(self, members: Crew, lost: LearnerDownError) -> None:
        """Forget what came after the newest checkpoint: it is issued again."""
        self._stop_softly = self._pipeline = None
        self._watchdog.step()
        checkpoint = self._checkpoint()
        state = DriverState.read(checkpoint) if checkpoint else None
        self._progress.roll_back(state)
        self._ledger = self._ledger_of(state)
        if self._gone_on:
            self.directory.drop_rows_after(self._progress.step)
            self.directory.write_summary(self._progress.summary("running"))

        self._say(
            f"the learner was lost ({first_line(lost)}); another one goes on from step "
            f"{self._progress.step}, as incarnation {self._progress.incarnation}"
        )
        await members.learner.start(self._progress.incarnation)
        members.channel.disconnect()

    async def _train(self, members: Crew, telemetry: Telemetry) -> None:
        self._pipeline = pipeline = make_pipeline(
            self._config, self._prepared, members, self._ledger, self._progress, self._drop
        )
        self._stop_softly = pipeline.buffer.close

        try:
            await self._follow(pipeline, members, telemetry)
        except RunFailedError:
            try:  # what was trained is not lost with what cannot go on
                await self._save_the_rest(members)
            except (StorageError, LearnerDownError):  # the first error is the one to be told
                logger.warning("the last steps could not be saved", exc_info=True)
            raise

        self._stop_softly = self._pipeline = None
        await self._save_the_rest(members)

    async def _follow(self, pipeline: Pipeline, members: Crew, telemetry: Telemetry) -> None:
        """Run the loop to its end, with a row, a record and now and then a checkpoint of what
        it has done.
        """
        # whatever ends it, nothing of it stays in flight
        async with aclosing(pipeline.steps(self._progress.step)) as steps:
            async for done in steps:
                self._watchdog.step()
                telemetry.write(
                    {**self._state_of(members), **cluster.memory_row(), **step_row(done)}
                )
                self._tell_of(done)
                self.directory.add_trained(self._progress.step, done.trained)
                if self._progress.step % self._config.checkpoint.every == 0:
                    await self._save(members)

    async def _save_the_rest(self, members: Crew) -> None:
        if self._progress.step > (self._progress.checkpoint_step or 0):
            await self._save(members)

    def _drop(self, issue: int, lost: LostTrajectory) -> None:
        """Record a trajectory that is given up."""
        self.directory.add_dropped(issue, lost)
        self._say(
            f"gave up {lost.key}: {lost.reason.value}: {lost.detail}; see {self.directory.dropped}"
        )

    def _ledger_of(self, state: DriverState | None) -> Ledger:
        """The ledger of a checkpoint, or a new one; what was dropped since is not tried again."""
        ledger = Ledger.restore(**state.ledger) if state else Ledger()  # type: ignore[arg-type]
        ledger.drop_again(self.directory.dropped_issues())
        return ledger

    def _state_of(self, members: Crew) -> Row:
        """Who is up and at work now, and who was lost so far; nobody is asked."""
        return {
            **members.teacher.metrics(),
            **members.engines.metrics(),
            **self._progress.row(),
            "eopd_weight_failures_total": float(members.channel.num_failures),
            **config_row(self._config),
        }

    async def _show_state(self, members: Crew) -> Never:
        """Let Prometheus and the terminal see what goes on also while no step ends: that is
        when it matters.
        """
        while True:
            await asyncio.sleep(_STATE_S)
            if (pipeline := self._pipeline) is not None:
                ready = f"{pipeline.buffer.num_ready} of {pipeline.plan.batch} trajectories ready"
                self._console.doing(f"step {self._progress.step + 1}: {pipeline.activity}, {ready}")

            if self._prometheus is not None:
                self._prometheus.write(self._state_of(members))

    def _tell_of(self, done: StepDone) -> None:
        """What people look at besides the row; nothing else may be lost with it."""
        if self._progress.newly_skipped > 0:
            self._say(
                f"step {self._progress.step}: loss or gradient not finite, optimiser step "
                f"skipped ({done.stats.skipped_steps} of at most "
                f"{self._config.learner.max_skipped_steps}); see {self.directory.broken}"
            )
        try:
            self.directory.add_timeline(self._progress.step, done.spans)
        except OSError:
            logger.warning(
                "the timeline of step %d was not kept", self._progress.step, exc_info=True
            )

    async def _save(self, members: Crew) -> None:
        started = time.monotonic()
        await write_checkpoint(
            self.directory.checkpoints,
            self._progress.state(self._ledger, self._taken_up.inputs),
            members.learner.save,
            keep_last=self._config.checkpoint.keep_last,
        )
        self._progress.checkpoint_s = time.monotonic() - started
        self._progress.checkpoint_step = self._progress.step
        self.directory.write_summary(self._progress.summary("running"))

    async def _measure(self, members: Crew, phase: Literal["before", "after"]) -> None:
        self._watchdog.step()
        measured = await measure_held_out(
            members,
            self._config,
            self._prepared,
            phase=phase,
            say=self._say,
            doing=self._console.doing,
        )
        if measured is None:
            return

        if phase == "before":
            self._progress.before = held_out_record(measured.stats)
        else:
            self._progress.after = held_out_record(measured.stats)

        self.directory.write_summary(self._progress.summary("running"))
        await keep_samples(
            self.directory,
            self._config,
            self._prepared,
            phase=phase,
            step=self._progress.step,
            measured=measured,
        )

    @asynccontextmanager
    async def _telemetry(self) -> AsyncIterator[Telemetry]:
        sinks, self._prometheus, self._trackers, notes = open_sinks(self._config, self.directory)
        run = self._config.run
        self._console = Console(
            run=run.name, batches=run.batches, expected_minutes=run.expected_minutes
        )
        fan_out = Telemetry([*sinks, self._console])

        try:
            notes += notes_on(self._config, self._prepared)
            for note in (f"run directory {self.directory.path}", *self._notes, *notes):
                self._say(note)

            yield fan_out
        finally:
            fan_out.close()

    def _interrupt(self) -> bool:
        """Take a signal; False means that nothing can end softly now."""
        first, self._interrupted = not self._interrupted, True
        if not first or self._stop_softly is None:
            self._say("stopping now")
            return False

        self._say("stopping after the step under way, with a checkpoint; once more to stop at once")
        # kept: the loop holds tasks weakly
        self._stopping = asyncio.create_task(self._stop_softly())

        return True
