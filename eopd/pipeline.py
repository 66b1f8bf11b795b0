"""The loop, told whole, in plain asyncio. It knows roles and headers, nothing else.

    task               consumes                     waits for              is unblocked by
    _issue             issue numbers (ledger)       a free slot            buffer.release, after a publish
    _produce, many     one prompt                   engine, then teacher   their answers; then its batch: buffer.take
    steps (caller)     a full batch (buffer)        a full batch           _produce offering the last one missing
                       then learner.step, then channel.publish, then buffer.release: in this order, so that whatever is
                       admitted next is written by weights at most max_staleness versions behind its batch

One loop serves both modes: ``max_staleness`` 0 gives a batch's worth of slots, so nothing is admitted before the
weights it made are published. A trajectory that is lost, or too stale by accident, is sampled again by the same task
under the same number: nothing is skipped, nothing is trained twice.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from eopd.buffer import Buffer
from eopd.ledger import Ledger
from eopd.packing import pack
from eopd.prompts import PromptOrder
from eopd.roles import Learner, RolloutEngine, TeacherScorer, WeightChannel
from eopd.telemetry.catalog import Row
from eopd.telemetry.step import BusyClock, Span, Totals, step_row
from eopd.types import Header, LossReason, LostTrajectory, ScoredTrajectory, Stored


class TrajectoryLostError(RuntimeError):
    """One trajectory failed ``max_attempts`` times: something is broken that sampling again does not mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers the loop needs."""

    batch: int
    batches: int
    max_staleness: int
    lookahead: int
    max_attempts: int
    temperature: float
    max_response_tokens: int
    ranks: int
    optimizer_steps: int
    token_budget: int
    alpha_at: Callable[[int], float]


@dataclass(slots=True)
class Pipeline:
    """Everything between prompts and weights. Iterate ``steps`` to run it."""

    plan: Plan
    engines: RolloutEngine
    teacher: TeacherScorer
    learner: Learner
    channel: WeightChannel
    order: PromptOrder
    ledger: Ledger
    totals: Totals
    buffer: Buffer = field(init=False)
    trained: Mapping[int, Header] = field(init=False, default_factory=dict)  # by issue, of the row yielded last
    busy: Mapping[str, Sequence[Span]] = field(init=False, default_factory=dict)  # of that row, from its step's start
    doing: str = field(init=False, default="starting")  # for people: what the next row waits for
    _generating: BusyClock = field(init=False, default_factory=BusyClock)
    _scoring: BusyClock = field(init=False, default_factory=BusyClock)
    _written_at: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.buffer = Buffer(
            batch=self.plan.batch,
            max_staleness=self.plan.max_staleness,
            lookahead=self.plan.lookahead,
            next_unconsumed=self.ledger.floor,
            consumed_ahead=set(self.ledger.trained_ahead),
        )

    async def steps(self, start: int) -> AsyncGenerator[Row, None]:
        """Run batches ``start`` to ``plan.batches``, yielding the row of each once its weights are published.

        Closing the iterator between two steps stops every task; closing ``buffer`` ends it after the step under way.
        Whatever a task raises ends the iteration.

        Raises:
            TrajectoryLostError: see there.
        """
        async with _background(self._issue((self.plan.batches - start) * self.plan.batch)) as failed:
            for number in range(start, self.plan.batches):
                row = await _unless(failed, self._step(number, time.monotonic()))
                if row is None:
                    return
                yield row

    def status(self) -> str:
        """What the loop waits for, for people."""
        buffer = self.buffer
        return (
            f"{self.doing}; {buffer.num_ready} of {self.plan.batch} trajectories ready, the lowest missing is issue "
            f"{buffer.next_missing}, {buffer.num_in_flight} of {buffer.num_slots} slots taken"
        )

    async def _step(self, number: int, started: float) -> Row | None:
        self.doing = "waiting for a batch"
        taken = await self.buffer.take(version=number)
        if not taken:
            return None
        full = time.monotonic()
        written = max(started, *(self._written_at.pop(t.issue) for t in taken))
        ready = self.buffer.num_ready
        in_flight = self.buffer.num_in_flight - len(taken) - ready
        plan = self.plan
        batch = pack(
            [t.stored for t in taken],
            steps=plan.optimizer_steps,
            ranks=plan.ranks,
            token_budget=plan.token_budget,
            alpha=plan.alpha_at(number),
        )
        self.doing = "training"
        stats = await self.learner.step(batch)
        self.doing = "bringing the weights to the engines"
        trained = time.monotonic()
        published = await self.channel.publish(stats.version)
        self.trained = {t.issue: t.stored.header for t in taken}
        self.ledger.train(self.trained)
        headers = list(self.trained.values())
        self.totals.add(headers)
        await self.buffer.release(len(taken))
        ended = time.monotonic()
        spans = {"generate": self._generating.lap(), "score": self._scoring.lap()}
        self.busy = {stage: [(a - started, b - started) for a, b in of_stage] for stage, of_stage in spans.items()}
        seconds = {
            **{stage: sum(b - a for a, b in of_stage) for stage, of_stage in spans.items()},
            "step": ended - started,
            "wait": full - started,
            "wait_rollout": written - started,
            "wait_teacher": full - written,
            "train": trained - full,
            "weights": ended - trained,
        }
        return step_row(
            headers,
            stats,
            published,
            seconds=seconds,
            totals=self.totals,
            lost=self.ledger.lost,
            in_flight=in_flight,
            ready=ready,
        )

    async def _issue(self, count: int) -> None:
        """Admit so many trajectories as slots come free, each a task of its own."""
        async with asyncio.TaskGroup() as producers:
            for _ in range(count):
                issue = self.ledger.issue()
                await self.buffer.admit()
                producers.create_task(self._produce(issue))

    async def _produce(self, issue: int) -> None:
        """Write and score one trajectory, until a batch consumes it."""
        for attempt in range(self.plan.max_attempts):
            result = await self._write_and_score(issue, attempt)
            if not isinstance(result, LostTrajectory):
                if await self.buffer.offer(issue, result):
                    return
                detail = "older than max_staleness when its batch was taken"
                result = LostTrajectory(key=result.header.key, reason=LossReason.TOO_STALE, detail=detail)
            self.ledger.lost[result.reason] += 1
            lost = result
        raise TrajectoryLostError(
            f"trajectory {lost.key} was lost {self.plan.max_attempts} times, last: {lost.reason.value}: {lost.detail}"
        )

    async def _write_and_score(self, issue: int, attempt: int) -> Stored[ScoredTrajectory] | LostTrajectory:
        prompt, sample_index = self.order.at(issue)
        plan = self.plan
        sampling = self.order.sampling(
            issue, temperature=plan.temperature, max_tokens=plan.max_response_tokens, attempt=attempt
        )
        with self._generating:
            written = await self.engines.generate(prompt, sample_index, sampling)
        if isinstance(written, LostTrajectory):
            return written
        self._written_at[issue] = time.monotonic()
        with self._scoring:
            return await self.teacher.score(written)


@asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[asyncio.Task[None]]:
    """A task that lives as long as the block; cancelled, with all its children, on the way out."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _unless(failed: asyncio.Task[None], work: Coroutine[object, object, Row | None]) -> Row | None:
    """Await ``work``, unless ``failed`` raises first: then its error is raised and ``work`` is cancelled."""
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({failed, working}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done() and not working.done():
            await failed  # raises; when everything was issued it returns, and work goes on
        return await working
    finally:
        working.cancel()
