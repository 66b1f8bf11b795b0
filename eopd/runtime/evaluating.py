"""Evaluation in a run: what is due is measured on its live workers.

    after the weights of step n reached every engine
    held-out prompts   the learner waits: it measures, and its weights must stay those of step n
    benchmarks         the learner's next step goes on; its publish waits for the last answer

Both are asked before training's own requests. A measurement that a lost learner or an interruption
cuts short is forgotten; a run that goes on at its step measures it then.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

from eopd.config import BenchmarkConfig, Config, ConfigError
from eopd.config.benchmark import HELD_OUT, ks_of
from eopd.evaluation.benchmarks import BenchmarkResult, Fetch, run_benchmark
from eopd.evaluation.beside import Beside, OneVersion
from eopd.evaluation.held_out import measure_held_out
from eopd.evaluation.samples import sample_record
from eopd.evaluation.summary import by_prompt, differences, measurements
from eopd.fleet import Fleet
from eopd.hub import model_directory
from eopd.preflight import Prepared
from eopd.rewards.graders import open_grader
from eopd.rewards.verdict import Grader, Verdict
from eopd.roles import RolloutEngine
from eopd.run.directory import RunDirectory
from eopd.run.evaluations import Evaluation, Phase
from eopd.run.record import Measurement, Row
from eopd.runtime.logs import logger
from eopd.runtime.outlets import Outlets
from eopd.runtime.state import RunState
from eopd.runtime.supervisor import Workers, fetch
from eopd.telemetry.evaluations import evaluation_line, evaluation_row
from eopd.tokenizer import load_tokenizer
from eopd.types import (
    ByPrompt,
    EvalStats,
    LostTrajectory,
    PromptSample,
    ScoredTrajectory,
    Stored,
)

T = TypeVar("T")


class Evaluator:
    """Measures a run, and keeps what was measured.

    Args:
        config: the run's.
        prepared: its prompts, held out and of benchmarks.
        state: where measurements go.
        workers: engines write, teachers score, the learner measures.
        outlets: where people look.
        alive: is called whenever a response was measured: so long nothing hangs.
        fetch: brings the body of a response here.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        state: RunState,
        workers: Workers,
        outlets: Outlets,
        alive: Callable[[], None],
        fetch: Fetch = fetch,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._state = state
        self._workers = workers
        self._outlets = outlets
        self._alive = alive
        self._fetch = fetch
        self.beside = Beside()
        self._news: dict[str, float] = {}
        _join_when_written(workers.engines.fleet, self.beside)

    async def evaluate(self, phase: Phase) -> None:
        """Measures what is due at this step, whose weights the engines serve. Benchmarks go on when it
        returns, but for those after training; if one has failed meanwhile, the next call raises that.

        Raises:
            LearnerDownError: the learner was lost.
            RunFailedError: no engine is left, or the disk is full.
        """
        self.beside.raise_failed()
        names = self._due(phase)
        if not names:
            return

        with self._outlets.phase("measuring"):
            await self._measure(phase, names)

    async def _measure(self, phase: Phase, names: Sequence[str]) -> None:
        await self.beside.finish()  # what was measured before comes first
        self._alive()
        self._state.expect(names)
        if HELD_OUT in names:
            await self._measure_held_out(phase)

        for benchmark in self._config.evaluation.benchmarks:
            if benchmark.name in names:
                self._start(benchmark, phase)

        if phase == "after":
            await self.beside.finish()

    async def cancel(self) -> None:
        """Gives up the benchmarks under way, so that nothing waits for them."""
        self._state.expect_no_more(self._config.evaluation.names)
        if await self.beside.cancel():
            self._outlets.say("the benchmarks under way were given up")

    def new_row(self) -> Row:
        """Returns the metrics of what was measured since the last call, and how long the last weights
        waited.
        """
        news, self._news = self._news, {}
        return news | {"eopd_eval_wait_seconds": self.beside.waited_s}

    def status(self) -> str:
        """Returns what is under way, for people."""
        left = self.beside.left
        return f"{left} answers of benchmarks to be written" if left else "idle"

    def _due(self, phase: Phase) -> list[str]:
        evaluation, step = self._config.evaluation, self._state.progress.step
        if phase == "after":
            return list(evaluation.names)

        due = [name for name in evaluation.names if evaluation.is_due(name, step)]
        return [name for name in due if not self._state.is_measured(name)]

    async def _measure_held_out(self, phase: Phase) -> None:
        started, step = time.monotonic(), self._state.progress.step
        measured = await measure_held_out(
            self._workers.engines,
            self._workers.teacher,
            self._workers.learner,
            self._prepared.held_out.prompts,
            self._config,
            when=f"after step {step}" if phase == "during" else f"{phase} training",
            say=self._outlets.say,
            doing=self._doing,
        )
        if measured is None:
            self._state.expect_no_more([HELD_OUT])
            return

        stats, scored = measured
        self._record(
            Evaluation(
                step=step,
                phase=phase,
                name=HELD_OUT,
                time=time.time(),
                seconds=time.monotonic() - started,
                prompts=stats.num_prompts,
                samples=1,
                measurements=measurements(stats.by_prompt),
                differences=differences(stats.by_prompt, self._first(HELD_OUT)),
                by_prompt=stats.by_prompt,
            )
        )
        if phase != "during":
            await _keep_samples(
                self._state.directory,
                self._config,
                self._prepared,
                phase=phase,
                step=step,
                stats=stats,
                scored=scored,
            )

    def _start(self, benchmark: BenchmarkConfig, phase: Phase) -> None:
        prompts = self._prepared.benchmarks[benchmark.name].prompts[: benchmark.prompts]
        step, expected = self._state.progress.step, len(prompts) * benchmark.samples
        tell = partial(self._tell, benchmark.name, expected)
        engines = OneVersion(self._workers.engines, step, expected, tell)
        self.beside.start(engines, self._run(benchmark, prompts, engines, phase, step))

    async def _run(
        self,
        benchmark: BenchmarkConfig,
        prompts: Sequence[PromptSample],
        engines: OneVersion,
        phase: Phase,
        step: int,
    ) -> None:
        """Runs a benchmark on the weights of a step, and records what it measured; says so where its
        grader cannot be loaded any more, and training goes on.
        """
        started, key = time.monotonic(), f"evaluation.benchmarks.{benchmark.name}.grader"
        try:
            async with _in_a_thread(open_grader(benchmark.grader, key=key)) as grader:
                result = await self._answers(benchmark, prompts, engines, grader)
        except ConfigError as error:
            self._outlets.say(f"step {step}, {benchmark.name}: not measured: {error}")
            self._state.expect_no_more([benchmark.name])
            return

        ks = ks_of(benchmark.samples)[1:]  # what would be pass@1 is avg@n
        numbers = await asyncio.to_thread(by_prompt, result, ks)
        failed = result.num_verdicts[Verdict.ERROR] + result.num_verdicts[Verdict.TIMEOUT]
        counts = {"lost": result.num_lost, "not_graded": failed}
        counted = {name: Measurement(mean=float(count)) for name, count in counts.items()}
        self._record(
            Evaluation(
                step=step,
                phase=phase,
                name=benchmark.name,
                time=time.time(),
                seconds=time.monotonic() - started,
                prompts=len(prompts),
                samples=benchmark.samples,
                measurements=measurements(numbers) | counted,
                differences=differences(numbers, self._first(benchmark.name)),
                by_prompt=numbers,
            )
        )

    async def _answers(
        self,
        benchmark: BenchmarkConfig,
        prompts: Sequence[PromptSample],
        engines: OneVersion,
        grader: Grader,
    ) -> BenchmarkResult:
        tokenizer = load_tokenizer(model_directory(self._config.student.model))
        return await run_benchmark(
            engines,
            prompts,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            grader,
            benchmark,
            fetch=self._fetch,
            seed=self._config.evaluation.seed,
            max_tokens=benchmark.max_response_tokens or self._config.held_out_response_tokens,
        )

    def _first(self, name: str) -> ByPrompt:
        first = (one.by_prompt for one in self._state.evaluations if one.name == name)
        return next(first, {})

    def _record(self, evaluation: Evaluation) -> None:
        self._alive()
        self._state.record(evaluation)
        self._outlets.say(evaluation_line(evaluation))
        row = evaluation_row(evaluation)
        self._news |= row
        self._outlets.show_state(row)

    def _tell(self, name: str, expected: int, done: int) -> None:
        self._doing(f"answers to {name}: {done}/{expected}")

    def _doing(self, text: str) -> None:
        self._alive()
        self._outlets.doing(text)


def _join_when_written(fleet: Fleet[RolloutEngine], beside: Beside) -> None:
    join = fleet.join

    async def join_later(number: int, engine: RolloutEngine) -> None:
        await beside.written_or_nobody(lambda: fleet.pool.num_up)
        await join(number, engine)

    fleet.join = join_later


async def _keep_samples(
    directory: RunDirectory,
    config: Config,
    prepared: Prepared,
    *,
    phase: str,
    step: int,
    stats: EvalStats,
    scored: Sequence[Stored[ScoredTrajectory]],
) -> None:
    """Write a measurement and its samples. A failure is logged, and ends no run."""
    try:
        samples = await _records(config, prepared, scored[: config.evaluation.samples])
        directory.add_held_out(phase, step, stats, samples)
    except Exception:  # noqa: BLE001 - see above
        logger.warning("the samples of this measurement were not kept", exc_info=True)


async def _records(
    config: Config, prepared: Prepared, scored: Sequence[Stored[ScoredTrajectory]]
) -> list[Mapping[str, object]]:
    tokenizer = load_tokenizer(model_directory(config.student.model))
    texts = prepared.held_out.texts
    return [
        await asyncio.to_thread(
            sample_record, body, texts[body.trajectory.prompt.prompt_id], tokenizer
        )
        for body in await asyncio.gather(*map(fetch, scored))
        if not isinstance(body, LostTrajectory)
    ]


@asynccontextmanager
async def _in_a_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves a context in a thread, since that starts and ends a process."""
    stack = ExitStack()
    entering = asyncio.create_task(asyncio.to_thread(stack.enter_context, manager))
    try:
        yield await asyncio.shield(entering)
    finally:
        await asyncio.wait([entering])  # where it was cancelled, it still enters
        await asyncio.to_thread(stack.close)
