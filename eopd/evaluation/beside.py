"""Benchmarks beside training: the engines answer under one version, while the learner goes on.

    task                     waits for                          is unblocked by
    a benchmark, background  its answers, then their grades     engines, then its grader
    the learner's next step  nothing of it                      -
    the next publish         ``Beside.written``                 the last answer; it need not be graded
    an engine that joins     the same, while others are up      the same, or the loss of the others

Held-out prompts cannot be measured so: they need the learner's weights of the version, of which
there is one set alone.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final

from eopd.roles import RolloutEngine
from eopd.types import (
    LostReason,
    LostTrajectory,
    PromptSample,
    Sampling,
    Stored,
    Trajectory,
)

_LOOK_AGAIN_S: Final = 0.5


class OneVersion:
    """A ``RolloutEngine`` for one benchmark, which lets through what was written under one version.

    Where all engines were lost, those in their place may have the learner's newer weights: their
    answers are lost.

    Args:
        engines: what writes.
        step: the step whose weights they serve.
        expected: the number of requests that will come.
        tell: is called with the number of answers so far.
    """

    def __init__(
        self,
        engines: RolloutEngine,
        step: int,
        expected: int,
        tell: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.written = asyncio.Event()  # also set where the benchmark ends without them
        self.done = 0
        self.expected = expected
        self._engines = engines
        self._step = step
        self._tell = tell

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Samples one response; one that other weights had a part in is lost."""
        answer = await self._engines.generate(prompt, sample_index, sampling)
        self.done += 1
        self._tell(self.done)
        if self.done == self.expected:
            self.written.set()

        if isinstance(answer, LostTrajectory):
            return answer

        header = answer.header
        if header.oldest_version == header.newest_version == self._step:
            return answer

        return LostTrajectory(
            key=header.key,
            reason=LostReason.ROLLOUT_FAILED,
            detail=f"written by weights of step {header.newest_version}, not {self._step}",
        )


@dataclass(slots=True)
class Beside:
    """The benchmarks that are under way, each a task of its own."""

    waited_s: float = 0.0  # in the last ``written``
    _under_way: dict[asyncio.Task[None], OneVersion] = field(default_factory=dict)

    def start(self, engines: OneVersion, work: Coroutine[object, object, None]) -> None:
        """Starts a benchmark, which asks ``engines``."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: engines.written.set())
        self._under_way[task] = engines

    @property
    def left(self) -> int:
        """The number of answers that are still to be written."""
        return sum(
            engines.expected - engines.done
            for engines in self._under_way.values()
            if not engines.written.is_set()
        )

    async def written(self) -> None:
        """Waits until the last answer is written, or its benchmark has failed."""
        started = time.monotonic()
        for engines in list(self._under_way.values()):
            await engines.written.wait()

        self.waited_s = time.monotonic() - started

    async def written_or_nobody(self, num_up: Callable[[], int]) -> None:
        """Waits until the last answer is written, or ``num_up`` engines that could are none: an engine
        that joins gets the learner's weights, which may be newer than those of the benchmark, and as
        the one with most free seats it would be asked first.
        """
        while self.left and num_up():
            await asyncio.sleep(_LOOK_AGAIN_S)

    def raise_failed(self) -> None:
        """Raises what a benchmark has failed with. A publish does not: by then the learner has made a
        step, which is to be counted first.

        Raises:
            RunFailedError: no engine is left, or the disk is full.
        """
        for task in [task for task in self._under_way if task.done()]:
            del self._under_way[task]
            task.result()

    async def finish(self) -> None:
        """Waits until everything is graded and recorded; raises as ``raise_failed`` does."""
        while self._under_way:
            await asyncio.wait(self._under_way)
            self.raise_failed()

    async def cancel(self) -> bool:
        """Gives up what is under way; returns whether there was anything."""
        tasks = [task for task in self._under_way if not task.done()]
        self._under_way.clear()
        for task in tasks:
            task.cancel()

        await asyncio.gather(*tasks, return_exceptions=True)
        return bool(tasks)
