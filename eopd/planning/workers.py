"""Workers of a simulation, which do nothing for as long as their work would take, and all roles of
the loop made of them.

The work of a response is its tokens, in every stage. Requests go to engines and replicas through the
pool of a run (``pool.py``), which has as many seats for each as vLLM would give it.
"""

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eopd.config import Config
from eopd.planning.balance import Counts
from eopd.planning.lengths import Lengths
from eopd.planning.needs import Hardware, seats_of
from eopd.pool import Pool
from eopd.telemetry.clocks import BusyClock
from eopd.types import (
    Header,
    LearnerStats,
    MicroBatch,
    PackedBatch,
    PolicyVersion,
    PromptSample,
    PublishStats,
    Sampling,
    ScoredTrajectory,
    StopReason,
    Stored,
    Trajectory,
    TrajectoryKey,
)

W = TypeVar("W")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What stages have to do: ``rates`` in response tokens a second of one engine, one replica and one
    rank; the lengths of responses; the seconds of a publish. An engine does its whole rate with
    ``full_at`` responses at a time; None is its share of the config's batch.
    """

    rates: Mapping[str, float]
    lengths: Lengths
    publish_s: float = 0.0
    full_at: int | None = None


class Engine:
    """An engine writes ``rate`` tokens a second while ``full`` responses or more are under way, and
    they share it equally. No response gets more than ``rate / full``, also where there are fewer.

    It keeps how many tokens a response would have that was under way since the beginning. A
    response of n tokens ends when that number has grown by n, however its speed changes.
    """

    def __init__(self, rate: float, full: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate, self._full = rate, full
        self._written, self._since = 0.0, self._loop.time()
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._tickets = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self.busy = BusyClock(self._loop.time)

    async def write(self, tokens: int) -> None:
        """Returns once a response of so many tokens is written."""
        self._go_on()
        done = self._loop.create_future()
        heapq.heappush(self._ends, (self._written + tokens, next(self._tickets), done))
        self._set_timer()
        with self.busy:
            await done

    @property
    def _speed(self) -> float:
        """The tokens a second of one response."""
        return self._rate / max(len(self._ends), self._full)

    def _go_on(self) -> None:
        now = self._loop.time()
        if self._ends:
            self._written += (now - self._since) * self._speed

        self._since = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

        if self._ends:
            seconds = (self._ends[0][0] - self._written) / self._speed
            self._timer = self._loop.call_later(seconds, self._end_the_next)

    def _end_the_next(self) -> None:
        """Ends the response that the timer was set for, and those that end in the same moment."""
        self._go_on()
        self._written = max(self._written, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self._written:
            done = heapq.heappop(self._ends)[-1]
            if not done.done():  # the simulation may have ended meanwhile
                done.set_result(None)

        self._set_timer()


class Replica:
    """A replica of a teacher reads one response after the other, in the order in which they come."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._turn = asyncio.Lock()
        self.busy = BusyClock(asyncio.get_running_loop().time)

    async def read(self, tokens: int) -> None:
        """Returns once a response of so many tokens is read."""
        async with self._turn:
            with self.busy:
                await asyncio.sleep(tokens / self._rate)


class Roles:
    """Every role of the loop at once: workers that do nothing for as long as it takes."""

    def __init__(self, config: Config, work: Work, counts: Counts, hardware: Hardware) -> None:
        share = math.ceil(config.batch_trajectories / config.rollout.engines)
        full = work.full_at or share
        rates = work.rates
        self.engines = [Engine(rates["generate"], full) for _ in range(counts["generate"])]
        self.replicas = [Replica(rates["score"]) for _ in range(counts.get("score", 0))]
        self.served = 0
        self._work = work
        self._engine_pool = _pool(self.engines, seats_of(config.rollout, hardware))
        teacher = next((one for one in config.teachers if one.backend == "vllm"), None)
        self._replica_pool = _pool(
            self.replicas, seats_of(teacher, hardware) if teacher is not None else 1
        )

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory]:
        """Returns a response of the length that its seed has, once an engine has written it."""
        tokens = self._work.lengths.of(sampling.seed)

        async def write(engine: Engine) -> int:
            version = self.served
            await engine.write(tokens)
            return version

        version = await self._engine_pool.run(write, sampling.priority)
        header = Header(
            key=TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index),
            source=prompt.source,
            num_prompt_tokens=len(prompt.token_ids),
            num_response_tokens=tokens,
            num_loss_tokens=tokens,
            stop_reason=StopReason.END_TOKEN,
            oldest_version=version,
            newest_version=self.served,
            response_crc32=0,
            sums={},
            priority=sampling.priority,
        )
        return Stored(header, None)

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory]:
        """Returns a response once a replica has read it, or at once where there is none."""
        header = stored.header
        if self.replicas:
            await self._replica_pool.run(
                lambda replica: replica.read(header.num_response_tokens), header.priority
            )

        return Stored(header, None)

    async def accumulate(self, part: PackedBatch) -> None:
        """Takes as long as the rank that has most tokens."""
        await asyncio.sleep(_most_tokens(part) / self._work.rates["train"])

    async def step(self, batch: PackedBatch) -> LearnerStats:
        """Takes as long as ``accumulate``; the new weights are the next version."""
        await self.accumulate(batch)
        return LearnerStats(version=PolicyVersion(0, self.served + 1), metrics={})

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        """Has engines write under a new version from the end of the publish on."""
        await asyncio.sleep(self._work.publish_s)
        self.served = version.step
        return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)

    def busy(self) -> Mapping[str, float]:
        """Returns the busy seconds of engines and replicas since the last call, in the mean."""
        seconds = {}
        for stage, workers in (("generate", self.engines), ("score", self.replicas)):
            spans = [span for worker in workers for span in worker.busy.lap()]
            if workers:
                seconds[stage] = sum(stop - start for start, stop in spans) / len(workers)

        return seconds


def _pool(workers: Sequence[W], seats: int) -> Pool[W]:
    pool = Pool[W]("worker", timeout_s=math.inf, ping=lambda worker: asyncio.sleep(0.0))
    for number, worker in enumerate(workers):
        pool.add(number, worker, seats)

    return pool


def _most_tokens(part: PackedBatch) -> int:
    """Returns the response tokens of the rank that has most, summed over optimiser steps."""
    return sum(max(map(_tokens, step.ranks)) for step in part.steps)


def _tokens(micro_batches: Iterable[MicroBatch]) -> int:
    return sum(stored.header.num_response_tokens for micro in micro_batches for stored in micro)
