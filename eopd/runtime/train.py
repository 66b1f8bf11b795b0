"""One training run from config to summary: check, start, measure and train, export.

    train ─ prepare, lock, take up ─▶ _run ─ outlets, signals ─▶ _work ─ actors ─▶ Training
      what the user may have got wrong      status and summary       what runs beside it

``Training`` holds what is whole from its first moment on: the state of the run, the workers, the
outlets. The learner may be lost under it; then it goes on from the newest checkpoint.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing, closing
from dataclasses import replace
from functools import partial
from typing import Never

from eopd.config import Config
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.preflight import Prepared, pinned, prepare
from eopd.preflight import notes as notes_on
from eopd.roles import LearnerDownError
from eopd.run.checkpoint import step_of
from eopd.run.lock import held, last_holder
from eopd.run.parent import forgets_moments_at
from eopd.run.place import free_row
from eopd.run.progress import Progress, first_line
from eopd.run.record import Row, Summary
from eopd.run.restore import restore
from eopd.run.storage import StorageError
from eopd.run.upload import Uploads
from eopd.runtime import cluster
from eopd.runtime.engines import scale_on_request
from eopd.runtime.evaluating import Evaluator
from eopd.runtime.guard import RunGuard
from eopd.runtime.inputs import digests
from eopd.runtime.logs import collect, logger
from eopd.runtime.outlets import Outlets, monitored, open_trackers, show_end
from eopd.runtime.placement import plan
from eopd.runtime.responses import Responses
from eopd.runtime.resume import Resume, TakenUp, config_to_continue, take_up
from eopd.runtime.signals import (
    Interruption,
    caught,
    heed,
    ignored_by_children,
    obeyed,
    require_main_thread,
)
from eopd.runtime.state import RunState
from eopd.runtime.supervisor import Workers, start_workers
from eopd.runtime.teachers import self_test_replicas
from eopd.runtime.watchdog import Watchdog, with_background
from eopd.telemetry import trackers
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.report.page import report_of_ended
from eopd.telemetry.step import config_row, ledger_row, step_row
from eopd.types import LostReason, LostTrajectory, RunFailedError, StepDone

_STATE_S = 5.0  # how often Prometheus sees who is up


def train(
    config: Config,
    *,
    resume: Resume = "no",
    step: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> tuple[Summary, bool]:
    """Runs (or continues) what ``config`` describes, as the only process that does.

    Args:
        config: the run.
        resume: whether it goes on from a checkpoint; see ``runtime/resume.py``.
        step: of that checkpoint; else the newest that is whole.
        say: is told of what is fetched before the run starts, and uploaded after it has ended.

    Returns:
        The summary, whose ``status`` is ``completed``, or ``interrupted`` after a signal that asked
        for it, or ``collapsed`` where the guard has ended the run; and whether anything was done: the
        run may have been complete already.

    Raises:
        ConfigError: the user's mistake, found before any worker starts; or this is no place for a
            run (``require_main_thread``).
        KeyboardInterrupt: a signal, or ``eopd stop``, has ended the wait for room; nothing was begun.
    """
    require_main_thread()
    config = pinned(config, config_to_continue(config, resume))
    prepared = prepare(config)
    with ExitStack() as stack:
        lock = held(
            config.run.path,
            wait_s=0.0 if resume == "no" else config.cluster.wait_s,
            say=say,
        )
        notes = [*stack.enter_context(lock), *restore(config, resume, say)]
        taken_up = take_up(config, digests(config, prepared), resume, step)
        uploads = stack.enter_context(Uploads(config, say))
        if taken_up.complete:
            assert taken_up.summary is not None
            uploads.start()  # what the process that completed it did not get there
            return taken_up.summary, False

        with ignored_by_children():
            stack.enter_context(cluster.connect(config.cluster))

        look = partial(heed, config.run.path)
        cluster.require_room(plan(config), config.cluster, say, look)
        taken_up = replace(taken_up, machines=cluster.machines())
        taken_up.begin()
        uploads.start()
        state = RunState(taken_up, uploads)
        endpoint = stack.enter_context(monitored(config))
        summary = asyncio.run(_run(prepared, taken_up, state, notes, endpoint))
        if summary.status in ("completed", "interrupted"):
            show_end(endpoint)

        return summary, True


async def _run(
    prepared: Prepared,
    taken_up: TakenUp,
    state: RunState,
    first_notes: Sequence[str],
    endpoint: PrometheusSink | None,
) -> Summary:
    """Runs, and writes status, summary and report whatever happens."""
    config, directory = taken_up.config, taken_up.directory
    status: trackers.Status = "failed"
    tracker_sinks = open_trackers(config, directory)

    interruption = Interruption()

    try:
        with (
            caught(interruption.take, asyncio.current_task()),
            obeyed(directory.path, interruption, asyncio.current_task()),
            collect(directory.logs, config.telemetry.log_format),
            closing(Outlets(config, directory, tracker_sinks, endpoint)) as outlets,
            state.uploads.told(outlets.say),
        ):
            interruption.say = outlets.say
            notes = [*first_notes, *taken_up.notes, *outlets.notes, *notes_on(config, prepared)]
            for note in (f"run directory {directory.path}", *notes):
                outlets.say(note)

            status = await _work(config, prepared, state, outlets, interruption)
    except asyncio.CancelledError:
        status = "interrupted"
        if not interruption.requested:
            raise
    finally:
        trackers.end(tracker_sinks, status)
        summary = state.end(status)
        report_of_ended(directory.path, directory.report)

    return summary


async def _work(
    config: Config,
    prepared: Prepared,
    state: RunState,
    outlets: Outlets,
    interruption: Interruption,
) -> trackers.Status:
    """Starts the actors, and trains with them while others watch; returns how it ended."""
    outlets.show_incarnation(state.progress.incarnation)
    outlets.say("starting the learner, the rollout engines and the teacher")
    async with start_workers(
        config,
        state.progress.incarnation,
        prepared.train.prompts,
        outlets.say,
        driver=last_holder(config.run.path),
    ) as workers:
        watchdog = Watchdog(config.run.stall_after_s, config.run.on_stall)
        training = Training(
            config,
            prepared,
            state,
            workers,
            outlets,
            interruption,
            watchdog,
        )
        await with_background(
            training.run(),
            watchdog.watch(training.status, outlets.say),
            scale_on_request(state.directory, workers.engines.fleet, outlets.say),
            training.show_state(),
        )

    if training.has_collapsed:
        return "collapsed"

    return "interrupted" if interruption.requested else "completed"


class Training:
    """Trains, measures and exports; goes on from the newest checkpoint, under a new incarnation,
    whenever the learner is lost.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        state: RunState,
        workers: Workers,
        outlets: Outlets,
        interruption: Interruption,
        watchdog: Watchdog,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._state = state
        self._workers = workers
        self._outlets = outlets
        self._interruption = interruption
        self._watchdog = watchdog
        self._evaluator = Evaluator(
            config,
            prepared,
            state,
            workers,
            outlets,
            watchdog.step,
        )
        self._pipeline: Pipeline | None = None  # while it trains
        self._guard = RunGuard(config.guard.on_collapse, state.directory, outlets.say)
        state.spared = self._guard.spared
        self._has_told_of_rewards = False

    @property
    def has_collapsed(self) -> bool:
        """Returns whether the guard has ended the run."""
        return self._guard.ending is not None

    async def run(self) -> None:
        """Runs to the end of the last batch, or to a step after which a signal or the guard ends
        it.
        """
        prompt_ids = self._prepared.train.prompts[0].token_ids
        fleets = self._workers.teacher.fleets
        for report in await self_test_replicas(self._config, fleets, prompt_ids):
            self._outlets.say(report.verdict)
            logger.info(str(report))

        lost: LearnerDownError | None = None

        while True:
            try:
                if lost is not None:
                    await self._restart_learner(lost)

                await with_background(
                    self._from_checkpoint_to_end(), self._workers.channel.sender_lost()
                )
                return
            except LearnerDownError as error:
                # a signal reaches the ranks too: the newest checkpoint stands
                if self._interruption.requested:
                    return

                lost = error
                self._workers.restarts.count_loss(f"learner: {error}")
            finally:  # whatever ended it, nothing of it stays in flight
                await self._evaluator.cancel()

    def status(self) -> list[str]:
        """Returns who waits for whom, a line each."""
        loop = "not training" if self._pipeline is None else self._pipeline.status()
        return [
            f"loop: {loop}",
            f"weights: {self._workers.channel.status()}",
            f"evaluation: {self._evaluator.status()}",
            *self._workers.engines.status(),
            *self._workers.teacher.status(),
        ]

    async def show_state(self) -> Never:
        """Lets Prometheus and the terminal see what goes on also while no step ends."""
        while True:
            await asyncio.sleep(_STATE_S)
            if (pipeline := self._pipeline) is not None:
                step = self._state.progress.step + 1
                there = pipeline.buffer.num_taken + pipeline.buffer.num_ready
                ready = f"{there} of {pipeline.plan.batch} trajectories ready"
                self._outlets.doing(f"step {step}: {pipeline.activity}, {ready}")

            self._outlets.show_state(self._row())

    async def _from_checkpoint_to_end(self) -> None:
        learner = self._workers.learner
        if (checkpoint := self._state.checkpoint) is not None:
            fresh = forgets_moments_at(self._state.directory.path, step_of(checkpoint))
            await learner.load(checkpoint / "learner", fresh_optimizer=fresh)

        await self._workers.channel.publish(await learner.version())
        self._state.go_on()
        self._guard.go_on_from(self._state.progress.step)
        await self._evaluate()
        await self._train()
        if self._interruption.requested:
            await self._evaluator.cancel()
        else:
            await self._evaluator.evaluate("after")

        self._outlets.begin("saving")
        self._watchdog.step()
        await self._state.export(learner)
        self._guard.say_last_words()

    async def _evaluate(self) -> None:
        """Measures what is due at this step, unless it is the last one, or the run shall end."""
        step = self._state.progress.step
        if step < self._config.run.batches and not self._interruption.requested:
            await self._evaluator.evaluate("during" if step else "before")

    async def _restart_learner(self, lost: LearnerDownError) -> None:
        self._watchdog.step()
        self._state.roll_back()
        progress = self._state.progress
        self._outlets.say(
            f"the learner was lost ({first_line(lost)}); another one goes on from step "
            f"{progress.step}, as incarnation {progress.incarnation}"
        )
        self._outlets.show_incarnation(progress.incarnation)
        await self._workers.learner.start(progress.incarnation)
        self._workers.channel.disconnect()

    async def _train(self) -> None:
        state, learner = self._state, self._workers.learner
        pipeline = pipeline_of(
            self._config,
            self._prepared,
            self._workers,
            state.ledger,
            state.progress,
            self._drop,
        )
        pipeline.before_publish = self._evaluator.beside.written
        responses = Responses(self._config, state.directory, self._prepared.train.texts)
        pipeline.on_trained = responses.take
        self._pipeline = pipeline

        async def end() -> None:
            await self._evaluator.cancel()
            pipeline.buffer.close()

        with self._interruption.ends_softly(end), self._outlets.phase("training"):
            try:
                async with responses:
                    await self._follow(pipeline)
            except StorageError:  # the disk takes no other checkpoint either
                raise
            except RunFailedError as error:
                await state.save_in_spite_of(error, learner)
                raise
            finally:
                self._pipeline = None

            await self._save()

    async def _save(self) -> None:
        with self._outlets.phase("saving"):
            self._watchdog.step()
            await self._state.save(self._workers.learner)

        self._watchdog.step()  # the time of the next step begins here

    async def _follow(self, pipeline: Pipeline) -> None:
        """Runs the loop to its end, with a row, a record and now and then a checkpoint of what it
        has done.
        """
        # whatever ends it, nothing of it stays in flight
        async with aclosing(pipeline.steps(self._state.progress.step)) as steps:
            async for done in steps:
                self._watchdog.step()
                row = {**self._row(), **cluster.memory_row(), **step_row(done)}
                self._outlets.write({**row, **self._evaluator.new_row(), **self._guard.take(row)})
                self._say_what_was_skipped(done)
                self._say_what_has_no_reward(done)
                self._state.keep(done)
                if self.has_collapsed:
                    return

                if self._state.is_due:
                    await self._save()

                await self._evaluate()

    def _row(self) -> Row:
        """Returns who is up and at work now, and who was lost so far; nobody is asked."""
        return {
            **self._workers.teacher.metrics(),
            **self._workers.engines.metrics(),
            **self._state.progress.row(),
            **ledger_row(self._state.ledger),
            **self._state.uploads.row(),
            "eopd_weight_failures_total": float(self._workers.channel.num_failures),
            "eopd_restart_budget_ratio": self._workers.restarts.used,
            **free_row(self._state.directory.path),
            **config_row(self._config),
        }

    def _say_what_was_skipped(self, done: StepDone) -> None:
        if self._state.progress.newly_skipped > 0:
            self._outlets.say(
                f"step {self._state.progress.step}: loss or gradient not finite, optimiser step "
                f"skipped ({done.stats.skipped_steps} of at most "
                f"{self._config.learner.max_skipped_steps}); see {self._state.directory.broken}"
            )

    def _say_what_has_no_reward(self, done: StepDone) -> None:
        """Says once that rewards are missing, and why; after that the log has a line a step."""
        faults = [header.reward_fault for header in done.trained.values() if header.reward_fault]
        if not faults:
            return

        step, number = self._state.progress.step, len(faults)
        text = f"step {step}: {number} of {len(done.trained)} responses have no reward: {faults[0]}"
        logger.warning(text)
        if not self._has_told_of_rewards:
            self._outlets.say(f"{text}; later ones are in {self._state.directory.logs}/driver.log")
            self._has_told_of_rewards = True

    def _drop(self, issue: int, lost: LostTrajectory) -> None:
        self._state.directory.add_dropped(issue, lost)
        if lost.reason is LostReason.FILTERED:  # there may be many
            return

        self._outlets.say(
            f"gave up {lost.key}: {lost.reason.value}: {lost.detail}; see "
            f"{self._state.directory.dropped}"
        )


def pipeline_of(
    config: Config,
    prepared: Prepared,
    workers: Workers,
    ledger: Ledger,
    progress: Progress,
    on_drop: Callable[[int, LostTrajectory], None],
) -> Pipeline:
    """Returns the loop of a run, from where ``ledger`` and ``progress`` stand."""
    return Pipeline(
        plan=Plan.of(config),
        engines=workers.engines,
        teacher=workers.teacher,
        learner=workers.learner,
        channel=workers.channel,
        order=prepared.order(config),
        ledger=ledger,
        progress=progress,
        on_drop=on_drop,
    )
