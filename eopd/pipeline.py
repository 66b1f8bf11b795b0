"""The loop, told whole, in plain asyncio. It knows roles and headers, nothing else.

    task               consumes                     waits for              is unblocked by
    _issue             issue numbers (ledger)       a free slot            buffer.release, after a publish
    _produce, many     one prompt                   engine, then teacher   their answers
                       then its batch               its fate               buffer.release (trained), or turned away
    steps (caller)     a full batch (buffer)        a full batch           _produce offering the last one missing
                       then learner.step, then channel.publish, then buffer.release: in this order, so that whatever is
                       admitted next is written by weights at most max_staleness versions behind its batch

One loop serves both modes: ``max_staleness`` 0 gives a batch's worth of slots, so nothing is
admitted before the weights it made are published. A trajectory that is lost, or too stale by
accident, is sampled again by the same task under the same number: nothing is skipped, nothing is
trained twice. One that is lost ``max_attempts`` times is dropped, and the task goes on with the
next number in its slot.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from eopd.buffer import Buffer, Taken
from eopd.ledger import Ledger
from eopd.packing import pack
from eopd.prompts import PromptOrder
from eopd.roles import BodiesLostError, Learner, RolloutEngine, TeacherScorer, WeightChannel
from eopd.run.progress import Progress
from eopd.telemetry.step import BusyClock
from eopd.types import (
    LearnerStats,
    LossReason,
    LostTrajectory,
    RunFailedError,
    ScoredTrajectory,
    Span,
    StepDone,
    Stored,
)


class TooManyDroppedError(RunFailedError):
    """More trajectories were dropped than a run may lose: something is broken that going on
    does not mend.
    """


FATES = {
    LossReason.TOO_STALE: "older than max_staleness when its batch was taken",
    LossReason.BODY_LOST: "its body was lost with its node",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers the loop needs."""

    batch: int
    batches: int
    max_staleness: int
    lookahead: int
    max_attempts: int
    max_dropped: int
    temperature: float
    max_response_tokens: int
    ranks: int
    optimizer_steps: int
    token_budget: int
    alpha_at: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class _TrainedBatch:
    """A batch and what the learner made of it; when it was full, and how much else was under
    way then.
    """

    taken: Sequence[Taken]
    stats: LearnerStats
    full_at: float
    in_flight: int
    ready: int


@dataclass(slots=True)
class Pipeline:
    """Everything between prompts and weights. Iterate ``steps`` to run it.

    ``on_drop`` is told the issue number of every trajectory that is given up, and how it was lost
    last.
    """

    plan: Plan
    engines: RolloutEngine
    teacher: TeacherScorer
    learner: Learner
    channel: WeightChannel
    order: PromptOrder
    ledger: Ledger
    progress: Progress
    on_drop: Callable[[int, LostTrajectory], None] = lambda issue, lost: None
    buffer: Buffer = field(init=False)
    doing: str = field(init=False, default="starting")  # for people: what the next step waits for
    _generating: BusyClock = field(init=False, default_factory=BusyClock)
    _scoring: BusyClock = field(init=False, default_factory=BusyClock)
    _written_at: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.buffer = Buffer(
            batch=self.plan.batch,
            max_staleness=self.plan.max_staleness,
            lookahead=self.plan.lookahead,
            settled=self.ledger.settled,
            dropped=self.ledger.dropped,
        )

    async def steps(self, start: int) -> AsyncGenerator[StepDone, None]:
        """Run batches ``start`` to ``plan.batches``, yielding each once its weights are published.

        Closing the iterator between two steps stops every task; closing ``buffer`` ends it after
        the step under way. Whatever a task raises ends the iteration.

        Raises:
            TooManyDroppedError: more than ``plan.max_dropped`` trajectories were dropped.
        """
        async with _background(
            self._issue((self.plan.batches - start) * self.plan.batch)
        ) as failed:
            for number in range(start, self.plan.batches):
                done = await _unless(failed, self._step(number, time.monotonic()))
                if done is None:
                    return

                yield done

    def status(self) -> str:
        """What the loop waits for, for people."""
        buffer = self.buffer
        return (
            f"{self.doing}; {buffer.num_ready} of {self.plan.batch} trajectories ready, the "
            f"lowest missing is issue {buffer.next_missing}, {buffer.num_in_flight} of "
            f"{buffer.num_slots} slots taken"
        )

    async def _step(self, number: int, started: float) -> StepDone | None:
        batch = await self._train(number)
        if batch is None:
            return None

        self.doing = "bringing the weights to the engines"
        trained_at = time.monotonic()
        published = await self.channel.publish(batch.stats.version)

        trained = {one.issue: one.stored.header for one in batch.taken}
        self.ledger.train(trained)
        self.buffer.release()
        ended = time.monotonic()

        spans = {"generate": self._generating.lap(started), "score": self._scoring.lap(started)}
        written = max(started, *(self._written_at.pop(issue) for issue in trained))
        seconds = {
            "generate": _length(spans["generate"]),
            "score": _length(spans["score"]),
            "step": ended - started,
            "wait": batch.full_at - started,
            "wait_rollout": written - started,
            "wait_teacher": batch.full_at - written,
            "train": trained_at - batch.full_at,
            "weights": ended - trained_at,
        }
        done = StepDone(
            trained=trained,
            stats=batch.stats,
            published=published,
            seconds=seconds,
            spans=spans,
            in_flight=batch.in_flight,
            ready=batch.ready,
            lost=dict(self.ledger.lost),
            dropped=len(self.ledger.dropped),
        )
        self.progress.count(done)
        return done

    async def _train(self, number: int) -> _TrainedBatch | None:
        """Take a batch and train on it; None once the buffer is closed."""
        plan = self.plan
        while True:
            self.doing = "waiting for a batch"
            taken = await self.buffer.take(version=number)
            if not taken:
                return None

            full_at = time.monotonic()
            ready = self.buffer.num_ready
            in_flight = self.buffer.num_in_flight - len(taken) - ready
            batch = pack(
                [one.stored for one in taken],
                steps=plan.optimizer_steps,
                ranks=plan.ranks,
                token_budget=plan.token_budget,
                alpha=plan.alpha_at(number),
            )
            self.doing = "training"

            try:
                stats = await self.learner.step(batch)
                return _TrainedBatch(
                    taken, stats, full_at=full_at, in_flight=in_flight, ready=ready
                )
            except BodiesLostError as error:
                self.buffer.put_back(
                    {one.issue for one in taken if one.stored.header.key in error.keys}
                )

    async def _issue(self, count: int) -> None:
        """Admit so many trajectories as slots come free, each a task of its own."""
        try:
            async with asyncio.TaskGroup() as producers:
                for _ in range(count):
                    await self.buffer.admit()
                    producers.create_task(self._produce(self.ledger.issue()))
        except ExceptionGroup as errors:
            if (ends := errors.subgroup(RunFailedError)) is not None:
                raise ends.exceptions[0] from None  # the first is what a person is told

            raise

    async def _produce(self, issue: int) -> None:
        """Write and score one trajectory until a batch has trained it, or the next one that
        is not dropped.
        """
        while (lost := await self._until_trained(issue)) is not None:
            self.ledger.drop(issue)
            self._written_at.pop(issue, None)
            self.on_drop(issue, lost)
            if len(self.ledger.dropped) > self.plan.max_dropped:
                raise TooManyDroppedError(
                    f"{len(self.ledger.dropped)} trajectories were dropped after "
                    f"flow.max_attempts = {self.plan.max_attempts} attempts each, "
                    f"flow.max_dropped_ratio allows {self.plan.max_dropped} in this run; the "
                    f"last one was {lost.key}: {lost.reason.value}: {lost.detail}"
                )

            self.buffer.skip(issue)
            issue = self.ledger.issue()

    async def _until_trained(self, issue: int) -> LostTrajectory | None:
        """None once a batch has trained it; how it was lost the last time after
        ``max_attempts``.
        """
        attempt = 0
        while True:
            result = await self._write_and_score(issue, attempt)
            if isinstance(result, Stored):
                reason = await self.buffer.offer(issue, result)
                if reason is None:
                    return None

                result = LostTrajectory(key=result.header.key, reason=reason, detail=FATES[reason])

            self.ledger.lost[result.reason] += 1
            attempt += result.reason is not LossReason.BODY_LOST  # which no sample is to blame for
            if attempt == self.plan.max_attempts:
                return result

    async def _write_and_score(
        self, issue: int, attempt: int
    ) -> Stored[ScoredTrajectory] | LostTrajectory:
        prompt, sample_index = self.order.at(issue)
        plan = self.plan
        sampling = self.order.sampling(
            issue,
            temperature=plan.temperature,
            max_tokens=plan.max_response_tokens,
            attempt=attempt,
        )
        with self._generating:
            written = await self.engines.generate(prompt, sample_index, sampling)

        if isinstance(written, LostTrajectory):
            return written

        self._written_at[issue] = time.monotonic()
        with self._scoring:
            return await self.teacher.score(written)


def _length(spans: Sequence[Span]) -> float:
    """Seconds of spans that do not overlap."""
    return sum(stop - start for start, stop in spans)


@asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[asyncio.Task[None]]:
    """A task that lives as long as the block; cancelled, with all its children, on the way out."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _unless(
    failed: asyncio.Task[None], work: Coroutine[object, object, StepDone | None]
) -> StepDone | None:
    """Await ``work``, unless ``failed`` raises first: then its error is raised and ``work``
    is cancelled.
    """
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({failed, working}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done() and not working.done():
            await failed  # raises; when everything was issued it returns, and work goes on

        return await working
    finally:
        working.cancel()
