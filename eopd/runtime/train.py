"""One training run from config to summary: check, start, measure, train, measure again, export."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Literal, Never

import numpy as np

from eopd.checkpoint import DriverState, list_checkpoints, write_checkpoint
from eopd.config import Config
from eopd.config.load import flatten
from eopd.config.processor import dtype_notes
from eopd.evaluation.held_out import measure
from eopd.evaluation.samples import sample_record
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.preflight import Prepared, check, notes_on_data
from eopd.prompts import PromptOrder
from eopd.roles import LearnerDownError
from eopd.runtime import cluster
from eopd.runtime.beside import Watchdog, scale_on_request
from eopd.runtime.logs import collect, logger
from eopd.runtime.placement import plan, require_capacity
from eopd.runtime.progress import Progress, first_line
from eopd.runtime.run_directory import RunDirectory, held_out_record
from eopd.runtime.signals import caught
from eopd.runtime.supervisor import Crew, crew, fetch
from eopd.teacher.vocabulary import load_tokenizer
from eopd.telemetry import trackers
from eopd.telemetry.catalog import Row
from eopd.telemetry.console import Console, Summary
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.report.page import report_of_ended
from eopd.telemetry.sinks import JsonlSink, Sink, Telemetry, TimelineSink
from eopd.telemetry.step import Span, Totals, config_row, resident_bytes
from eopd.types import EvalStats, LostTrajectory, ScoredTrajectory, Stored

_STATE_S = 5.0  # how often Prometheus sees who is up
_PROBE_TOKENS = 256  # of prompts, which the student finds probable


def train(config: Config, *, resume: bool) -> tuple[Summary, RunDirectory]:
    """Run (or continue) what ``config`` describes.

    Returns:
        The summary; its ``status`` is ``completed``, or ``interrupted`` after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: the user's mistake, found before any worker starts.
    """
    prepared = check(config)
    with cluster.connect(config.cluster):
        require_capacity(plan(config), *cluster.capacity())
        run = TrainingRun.resume(config, prepared) if resume else TrainingRun.new(config, prepared)
        return asyncio.run(run.main()), run.directory


class TrainingRun:
    """One process's part of a run: all of it, or from a checkpoint on."""

    def __init__(
        self, config: Config, prepared: Prepared, directory: RunDirectory, progress: Progress, ledger: Ledger
    ) -> None:
        self.directory = directory
        self._config = config
        self._prepared = prepared
        self._progress = progress
        self._ledger = ledger
        self._interrupted = False
        self._stop_softly: Callable[[], Coroutine[object, object, None]] | None = None
        self._pipeline: Pipeline | None = None
        self._trackers: list[trackers.BackgroundSink] = []
        self._prometheus: PrometheusSink | None = None

    @classmethod
    def new(cls, config: Config, prepared: Prepared) -> "TrainingRun":
        """A run from the beginning."""
        return cls(config, prepared, RunDirectory.create(config), Progress(), Ledger())

    @classmethod
    def resume(cls, config: Config, prepared: Prepared) -> "TrainingRun":
        """A run from its newest checkpoint on."""
        directory = RunDirectory.reopen(config)
        state = DriverState.read(list_checkpoints(directory.checkpoints)[-1])
        directory.drop_rows_after(state.step)
        summary = directory.read_summary()
        assert summary is not None, "it is written before the first checkpoint"
        progress = Progress.resume(state, summary)
        return cls(config, prepared, directory, progress, Ledger.restore(**state.ledger))  # type: ignore[arg-type]

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
            self.directory.write_summary(summary)
            report_of_ended(self.directory.path, self.directory.report)
            trackers.end(self._trackers, status)
        return summary

    def _say(self, text: str) -> None:
        self._console.message(text)
        logger.info(text)

    async def _run(self, telemetry: Telemetry) -> None:
        self._say("starting the learner, the rollout engines and the teacher")
        text = np.concatenate([prompt.token_ids for prompt in self._prepared.train.prompts[:_PROBE_TOKENS]])
        async with crew(self._config, self._progress.incarnation, text[:_PROBE_TOKENS]) as members:
            run = self._config.run
            self._watchdog = Watchdog(run.stall_after_s, run.on_stall, lambda: self._report(members))
            tell = self._say
            await members.restarts.guard(
                self._outlive_learners(members, telemetry),
                self._watchdog.watch(tell),
                scale_on_request(self.directory, members.rollouts, tell),
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
        """The whole run; from the newest checkpoint on, under a new incarnation, whenever the learner is lost."""
        for fleet in members.fleets:
            self._say(str(await fleet.self_test(self._prepared.train.prompts[0].token_ids)))
        lost: LearnerDownError | None = None
        while True:
            try:
                if lost is not None:
                    await self._restart_learner(members, lost)
                await self._from_checkpoint_to_end(members, telemetry)
                return
            except LearnerDownError as error:
                if self._interrupted:  # a signal reaches the ranks too: the newest checkpoint stands
                    return
                lost = error
                members.restarts.spend(f"learner: {error}")

    async def _from_checkpoint_to_end(self, members: Crew, telemetry: Telemetry) -> None:
        if checkpoints := list_checkpoints(self.directory.checkpoints):
            await members.learner.load(checkpoints[-1] / "learner")
        await members.channel.publish(await members.learner.version())
        if self._progress.before is None:
            await self._measure(members, "before")
        await self._train(members, telemetry)
        if not self._interrupted:
            await self._measure(members, "after")
        await members.learner.export(self.directory.hf)

    async def _restart_learner(self, members: Crew, lost: LearnerDownError) -> None:
        """Forget what came after the newest checkpoint: it is issued again."""
        self._stop_softly = self._pipeline = None
        self._watchdog.step()
        checkpoints = list_checkpoints(self.directory.checkpoints)
        state = DriverState.read(checkpoints[-1]) if checkpoints else None
        self._progress.roll_back(state)
        self._ledger = Ledger.restore(**state.ledger) if state else Ledger()  # type: ignore[arg-type]
        self.directory.drop_rows_after(self._progress.step)
        self.directory.write_summary(self._progress.summary("running"))
        self._say(
            f"the learner was lost ({first_line(lost)}); another one goes on from step {self._progress.step}, as "
            f"incarnation {self._progress.incarnation}"
        )
        await members.learner.start(self._progress.incarnation)
        members.channel.disconnect()

    async def _train(self, members: Crew, telemetry: Telemetry) -> None:
        self._pipeline = pipeline = self._make_pipeline(members)
        self._stop_softly = pipeline.buffer.close
        saved = self._progress.step
        async with aclosing(pipeline.steps(saved)) as steps:  # whatever ends it, nothing of it stays in flight
            async for row in steps:
                self._watchdog.step()
                held = {
                    "eopd_object_store_bytes": cluster.object_store_bytes(),
                    "eopd_driver_memory_bytes": resident_bytes(),
                }
                telemetry.write({**self._state_of(members), **row, **held})
                self._count(row)
                self.directory.add_trained(self._progress.step, pipeline.trained)
                if self._progress.step % self._config.checkpoint.every == 0:
                    await self._save(members)
                    saved = self._progress.step
        self._stop_softly = self._pipeline = None
        if self._progress.step > saved:
            await self._save(members)

    def _state_of(self, members: Crew) -> Row:
        """Who is up and at work now, and who was lost so far; nobody is asked."""
        return {
            **members.teacher.metrics(),
            **members.engines.metrics(),
            "eopd_learner_restarts_total": float(self._progress.learner_restarts),
            "eopd_weight_failures_total": float(members.channel.num_failures),
            "eopd_skipped_steps_total": float(self._progress.skipped_steps),
            **config_row(self._config),
        }

    async def _show_state(self, members: Crew) -> Never:
        """Let Prometheus see who is up also while no step ends: that is when it matters."""
        while True:
            await asyncio.sleep(_STATE_S)
            if self._prometheus is not None:
                self._prometheus.write(self._state_of(members))

    def _count(self, row: Row) -> None:
        skipped_before = self._progress.skipped_steps
        self._progress.count(row)
        if (skipped := self._progress.skipped_steps) > skipped_before:
            self._say(
                f"step {self._progress.step}: loss or gradient not finite, optimiser step skipped "
                f"({skipped} of at most {self._config.learner.max_skipped_steps}); see {self.directory.broken}"
            )

    async def _save(self, members: Crew) -> None:
        await write_checkpoint(
            self.directory.checkpoints,
            self._progress.state(self._ledger),
            members.learner.save,
            keep_last=self._config.checkpoint.keep_last,
        )
        self.directory.write_summary(self._progress.summary("running"))

    async def _measure(self, members: Crew, phase: Literal["before", "after"]) -> None:
        evaluation, learner = self._config.evaluation, self._config.learner
        prompts = self._prepared.held_out.prompts[: evaluation.prompts]
        self._say(f"measuring on {len(prompts)} held-out prompts, {phase} training")
        self._watchdog.step()
        stats, scored = await measure(
            members.engines,
            members.teacher,
            members.learner,
            prompts,
            max_tokens=evaluation.max_response_tokens,
            seed=evaluation.seed,
            max_attempts=self._config.flow.max_attempts,
            ranks=learner.ranks,
            token_budget=learner.token_budget,
        )
        if phase == "before":
            self._progress.before = held_out_record(stats)
        else:
            self._progress.after = held_out_record(stats)
        self.directory.write_summary(self._progress.summary("running"))
        try:
            await self._keep_samples(phase, stats, scored[: evaluation.samples])
        except Exception:  # noqa: BLE001 - for people to look at: nothing else may be lost with them
            logger.warning("the samples of this measurement were not kept", exc_info=True)

    async def _keep_samples(self, phase: str, stats: EvalStats, scored: Sequence[Stored[ScoredTrajectory]]) -> None:
        tokenizer, texts = load_tokenizer(self._config.student.model), self._prepared.held_out.texts
        samples = [
            await asyncio.to_thread(sample_record, body, texts[body.trajectory.prompt.prompt_id], tokenizer)
            for body in await asyncio.gather(*map(fetch, scored))
            if not isinstance(body, LostTrajectory)
        ]
        self.directory.add_samples(phase, self._progress.step, samples)
        self.directory.add_held_out(phase, self._progress.step, stats, samples)

    def _make_pipeline(self, members: Crew) -> Pipeline:
        config = self._config
        numbers = Plan(
            batch=config.batch_trajectories,
            batches=config.run.batches,
            max_staleness=config.flow.max_staleness,
            lookahead=config.flow.lookahead,
            max_attempts=config.flow.max_attempts,
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            ranks=config.learner.ranks,
            optimizer_steps=config.learner.optimizer_steps_per_batch,
            token_budget=config.learner.token_budget,
            alpha_at=config.loss.alpha_at,
        )
        prompts, samples = self._prepared.train.prompts, config.rollout.samples_per_prompt
        return Pipeline(
            numbers,
            members.engines,
            members.teacher,
            members.learner,
            members.channel,
            PromptOrder(prompts, samples_per_prompt=samples, seed=config.run.seed),
            self._ledger,
            Totals(tokens=self._progress.tokens, trajectories=self._progress.trajectories),
        )

    @asynccontextmanager
    async def _telemetry(self) -> AsyncIterator[Telemetry]:
        run, telemetry = self._config.run, self._config.telemetry
        sinks: list[Sink] = [JsonlSink(self.directory.metrics), TimelineSink(self.directory.timeline, self._busy)]
        notes = [f"run directory {self.directory.path}", *self.directory.passed_over(), *dtype_notes(self._config)]
        if telemetry.port is not None:
            self._prometheus = PrometheusSink(telemetry.host, telemetry.port, run=run.name)
            sinks.append(self._prometheus)
            notes.append(f"metrics at http://{self._prometheus.address}/metrics")
        settings = flatten(self._config.model_dump(mode="json"))
        self._trackers = [
            trackers.tracker(name, self.directory.path, run.name, settings) for name in telemetry.trackers
        ]
        sinks += self._trackers
        notes += notes_on_data(self._config, self._prepared)
        if cluster.is_job_copy(self.directory.path):
            notes.append("this is Ray's copy of the working directory: set run.directory to keep what the run writes")
        self._console = Console(run=run.name, batches=run.batches)
        fan_out = Telemetry([*sinks, self._console])
        try:
            for note in notes:
                self._say(note)
            yield fan_out
        finally:
            fan_out.close()

    def _busy(self) -> Mapping[str, Sequence[Span]]:
        return {} if self._pipeline is None else self._pipeline.busy

    def _interrupt(self) -> bool:
        """Take a signal; False means that nothing can end softly now."""
        first, self._interrupted = not self._interrupted, True
        if not first or self._stop_softly is None:
            self._say("stopping now")
            return False
        self._say("stopping after the step under way, with a checkpoint; once more to stop at once")
        self._stopping = asyncio.create_task(self._stop_softly())  # kept: the loop holds tasks weakly
        return True
