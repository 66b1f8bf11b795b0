"""The training loop, in plain asyncio. It knows roles and headers, nothing else.

    task                   consumes             waits for               is unblocked by
    _issue, one            an issue number      a free slot             buffer.release, after a publish
    _produce, one a slot   a prompt             an engine               its response
                           the response         a teacher               its scores
                           the scored           its outcome             buffer.release: it was trained
                             trajectory                                 buffer.take, put_back: it is lost
    steps, the caller      a part of a batch    enough of it, or all    the _produce that completes it
                           the packed part      learner.accumulate,     the learner ranks
                                                of the last one step
                           the new weights      channel.publish         the last engine that loads them
    _begin_next, within    a part of the next   learner.accumulate      the learner ranks
      a publish              batch, once the
                             weights are sent

    issue number ──▶ prompt ──▶ response ──▶ scored ──▶ buffer ──▶ batch ──▶ step ──▶ publish ──▶ release
         ▲                                                                                           │
         └──────────────────────────────────── free slots ◀──────────────────────────────────────────┘

Weights are published before slots are released: so the next trajectory to be admitted is sampled by
weights that are at most ``max_staleness`` versions behind its batch. Once the learner has sent them
it adds up gradients of the next batch, where parts of it are ready: its weights stay as they were
sent until all engines have them. One loop serves both modes:
``max_staleness`` 0 makes as many slots as a batch has trajectories, so that none is admitted before
the weights of the last batch are published.

The learner begins a batch while the rest of it is still being written: it adds up the gradients of
what is there, and steps once the last trajectory has come. Its weights stay the same until then, so
this makes nothing staler.

A trajectory that is lost, or too stale by accident, is sampled again by the same task under the
same number: nothing is skipped, nothing is trained twice. One that is lost ``max_attempts`` times
is dropped, and the task continues with the next number in its slot; so it does where the filter of
the run drops one.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

from eopd.buffer import Buffer, Part
from eopd.config import Config
from eopd.ledger import Ledger
from eopd.packing import pack_batch
from eopd.prompts import PromptOrder
from eopd.roles import BodiesLostError, Learner, RolloutEngine, TeacherScorer, WeightChannel
from eopd.run.progress import Progress
from eopd.telemetry.clocks import StepClock
from eopd.types import (
    LearnerStats,
    LostReason,
    LostTrajectory,
    PackedBatch,
    PolicyVersion,
    PublishStats,
    RunFailedError,
    ScoredTrajectory,
    StepDone,
    Stored,
    Trajectory,
    first_failure,
)


class NothingKeptError(RunFailedError):
    """The filter of the run keeps nothing, so that no batch becomes full."""


class TooManyDroppedError(RunFailedError):
    """More trajectories were dropped than a run may drop: something is broken that will not mend
    by itself.
    """


FILTERED_BATCHES: Final = 20
FEWEST_FILTERED: Final = 200  # also where batches are small

LOST_DETAILS = {
    LostReason.TOO_STALE: "older than max_staleness when its batch was taken",
    LostReason.BODY_LOST: "its body was lost with its node",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan holds the numbers that the loop needs; with ``streams`` the learner begins a batch
    before all of it is there.
    """

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
    streams: bool
    alpha_at: Callable[[int], float]

    @classmethod
    def of(cls, config: Config) -> Self:
        """Returns the plan of a run."""
        return cls(
            batch=config.batch_trajectories,
            batches=config.run.batches,
            max_staleness=config.flow.max_staleness,
            lookahead=config.flow.lookahead,
            max_attempts=config.flow.max_attempts,
            max_dropped=math.ceil(
                config.flow.max_dropped_ratio * config.batch_trajectories * config.run.batches
            ),
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            ranks=config.learner.ranks,
            optimizer_steps=config.learner.optimizer_steps_per_batch,
            token_budget=config.learner.token_budget,
            streams=config.waits_for_batch is None,
            alpha_at=config.loss.alpha_at,
        )


@dataclass(slots=True)
class Pipeline:
    """A pipeline runs everything between prompts and weights. Iterate ``steps`` to run it.

    ``on_drop`` is called with the issue number of every trajectory that is dropped or filtered, and
    with its last loss; ``on_trained`` with the number of every completed step, and what it trained
    on. A publish begins once ``before_publish`` returns. ``activity`` is what the next step waits
    for, for people. ``clock`` is what seconds are measured by: a simulation has one of its own.
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
    on_trained: Callable[[int, Sequence[Stored[ScoredTrajectory]]], None] = lambda step, batch: None
    before_publish: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    clock: Callable[[], float] = time.monotonic
    buffer: Buffer = field(init=False)
    activity: str = field(init=False, default="starting")
    _times: StepClock = field(init=False)
    _filtered_in_a_row: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._times = StepClock(self.clock)
        self.buffer = Buffer(
            batch=self.plan.batch,
            max_staleness=self.plan.max_staleness,
            lookahead=self.plan.lookahead,
            part_tokens=self.plan.ranks * self.plan.token_budget if self.plan.streams else None,
            settled=self.ledger.settled,
            dropped=self.ledger.dropped | self.ledger.filtered_ahead,
        )

    async def steps(self, start: int) -> AsyncGenerator[StepDone, None]:
        """Runs batches ``start`` to ``plan.batches``, yielding each once its weights are published.

        Closing the iterator between two steps stops every task; closing ``buffer`` ends it after
        the current step, or at once where the batch is not whole yet: it is begun again by whoever
        continues the run. An error of any task ends the iteration: a step that the learner has begun
        comes to its end before, so that what it holds is what was yielded.

        Raises:
            TooManyDroppedError: more than ``plan.max_dropped`` trajectories were dropped.
            NothingKeptError: the filter dropped ``FILTERED_BATCHES`` batches' worth in a row.
        """
        count = (self.plan.batches - start) * self.plan.batch
        issuing = asyncio.create_task(self._issue(count))
        issuing.add_done_callback(lambda _: self.buffer.close())  # no batch becomes full any more
        try:
            for number in range(start, self.plan.batches):
                done = await self._step(number)
                if done is None:
                    break

                yield done

            if issuing.done():
                issuing.result()  # raises the error that has closed the buffer
        finally:
            issuing.cancel()
            await asyncio.gather(issuing, return_exceptions=True)

    def status(self) -> str:
        """Returns what the loop waits for, for people."""
        buffer = self.buffer
        return (
            f"{self.activity}; of {self.plan.batch} trajectories the learner has "
            f"{buffer.num_taken}, and {buffer.num_ready} are ready, the lowest missing is issue "
            f"{buffer.next_missing}, {buffer.num_slots_held} of {buffer.num_slots} slots taken"
        )

    async def _step(self, number: int) -> StepDone | None:
        """Takes a batch, part by part, trains on it, and brings its weights to the engines; returns
        None once the buffer is closed.
        """
        self._times.start()
        stats = None
        while stats is None:
            self.activity = "waiting for a batch"
            part = await self.buffer.take(version=number)
            if part is None:
                return None

            in_flight, ready = self.buffer.num_in_flight, self.buffer.num_ready
            self.activity = "training"
            with suppress(BodiesLostError):
                stats = await self._learn(part, number)

        self._times.trained()
        taken = self.buffer.taken
        trained = {issue: stored.header for issue, stored in taken.items()}
        self.ledger.train(trained)
        self.buffer.settle()
        published = await self._publish(stats.version)

        spans, seconds = self._times.end(trained)
        done = StepDone(
            trained=trained,
            stats=stats,
            published=published,
            seconds=seconds,
            spans=spans,
            in_flight=in_flight,
            ready=ready,
        )
        self.progress.count(done)
        self.on_trained(stats.version.step, list(taken.values()))
        return done

    async def _publish(self, version: PolicyVersion) -> PublishStats:
        """Brings the weights to the engines and frees the slots of the batch; begins the next one as
        soon as the learner has sent them.
        """
        self.activity = "bringing the weights to the engines"
        sent = asyncio.Event()

        async def publish() -> PublishStats:
            try:
                await self.before_publish()
                published = await self.channel.publish(version, sent.set)
                self.buffer.release()
                return published
            except BaseException:
                self.buffer.close()  # no part of the next batch is begun any more
                raise
            finally:
                sent.set()

        publishing = asyncio.create_task(publish())
        try:
            await sent.wait()
            await self._begin_next(version.step)
            return await publishing
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    async def _begin_next(self, number: int) -> None:
        """Accumulates parts of a batch until the one before it is released."""
        while (part := await self.buffer.take(number, ahead=True)) is not None:
            with suppress(BodiesLostError):
                await self._learn(part, number)

    async def _learn(self, part: Part, number: int) -> LearnerStats | None:
        """Lets the learner accumulate a part of a batch; returns its statistics once it has stepped,
        with the last part.

        Raises:
            BodiesLostError: bodies are gone; the buffer has the part again.
        """
        since = self.clock()
        packed = self.pack(list(part.taken.values()), number)
        try:
            work = self.learner.step if part.completes else self.learner.accumulate
            stats = await work(packed)
        except BodiesLostError as error:
            lost = {issue for issue, one in part.taken.items() if one.header.key in error.keys}
            self.buffer.put_back(part, lost)
            raise

        self._times.learned(since)
        return stats

    def pack(self, stored: Sequence[Stored[ScoredTrajectory]], number: int) -> PackedBatch:
        """Returns trajectories of batch ``number`` as the learner's ranks take them."""
        return pack_batch(
            stored,
            steps=self.plan.optimizer_steps,
            ranks=self.plan.ranks,
            token_budget=self.plan.token_budget,
            alpha=self.plan.alpha_at(number),
        )

    async def _issue(self, count: int) -> None:
        """Admits ``count`` trajectories as slots become free, each with a task of its own."""
        with first_failure():
            async with asyncio.TaskGroup() as producers:
                for _ in range(count):
                    await self.buffer.admit()
                    producers.create_task(self._produce(self.ledger.issue()))

    async def _produce(self, issue: int) -> None:
        """Generates and scores one trajectory until a batch has trained on it. Where it is dropped,
        the next one takes its place.
        """
        while (lost := await self._until_trained(issue)) is not None:
            self._times.forget(issue)
            if lost.reason is LostReason.FILTERED:
                self._filter(issue, lost)
            else:
                self._drop(issue, lost)

            self.buffer.skip(issue)
            issue = self.ledger.issue()

    def _drop(self, issue: int, lost: LostTrajectory) -> None:
        self.ledger.drop(issue)
        self.on_drop(issue, lost)
        if len(self.ledger.dropped) > self.plan.max_dropped:
            raise TooManyDroppedError(
                f"{len(self.ledger.dropped)} trajectories were dropped after "
                f"flow.max_attempts = {self.plan.max_attempts} attempts each, "
                f"flow.max_dropped_ratio allows {self.plan.max_dropped} in this run; the "
                f"last one was {lost.key}: {lost.reason.value}: {lost.detail}"
            )

    def _filter(self, issue: int, lost: LostTrajectory) -> None:
        self.ledger.filter(issue)
        self.on_drop(issue, lost)
        self._filtered_in_a_row += 1
        if self._filtered_in_a_row >= max(FILTERED_BATCHES * self.plan.batch, FEWEST_FILTERED):
            raise NothingKeptError(
                f"flow.filter: the last {self._filtered_in_a_row} trajectories were dropped one "
                f"after the other, and none was kept; the last one was {lost.key}: {lost.detail}. "
                "Let the filter keep more, or look at what the student writes"
            )

    async def _until_trained(self, issue: int) -> LostTrajectory | None:
        """Returns None once a batch has trained on a trajectory; else what the filter said of it, or
        its last loss after ``max_attempts``.
        """
        attempt = 0
        while True:
            result = await self._generate_and_score(issue, attempt)
            if isinstance(result, Stored):
                self._filtered_in_a_row = 0
                reason = await self.buffer.offer(issue, result)
                if reason is None:
                    return None

                result = LostTrajectory(
                    key=result.header.key, reason=reason, detail=LOST_DETAILS[reason]
                )

            if result.reason is LostReason.FILTERED:
                return result

            self.ledger.lost[result.reason] += 1
            if result.reason is not LostReason.BODY_LOST:  # the sample is not to blame for that
                attempt += 1

            if attempt == self.plan.max_attempts:
                return result

    async def generate(self, issue: int, attempt: int) -> Stored[Trajectory] | LostTrajectory:
        """Has the engines write what an issue number stands for."""
        prompt, sample_index = self.order.at(issue)
        sampling = self.order.sampling(
            issue,
            temperature=self.plan.temperature,
            max_tokens=self.plan.max_response_tokens,
            attempt=attempt,
        )
        return await self.engines.generate(prompt, sample_index, sampling)

    async def _generate_and_score(
        self, issue: int, attempt: int
    ) -> Stored[ScoredTrajectory] | LostTrajectory:
        with self._times.generating:
            generated = await self.generate(issue, attempt)

        if isinstance(generated, LostTrajectory):
            return generated

        self._times.generated(issue)
        with self._times.scoring:
            return await self.teacher.score(generated)
