"""How many failures a run survives: each restart is counted, and too many within a window end the run."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine
from typing import Any, Never, TypeVar

from eopd.types import RunFailedError

T = TypeVar("T")


class TooManyRestartsError(RunFailedError):
    """More failures within the window than a run may have; names their causes."""


class RestartBudget:
    """At most ``max_restarts`` of engines, teacher replicas and learner gangs within ``window_s`` seconds."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts, self._window_s = max_restarts, window_s
        self._causes: deque[tuple[float, str]] = deque()
        self._exceeded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spend(self, cause: str) -> None:
        """Count one restart.

        Raises:
            TooManyRestartsError: it is one too many.
        """
        now = time.monotonic()
        self._causes.append((now, cause))
        while self._causes[0][0] < now - self._window_s:
            self._causes.popleft()
        if len(self._causes) > self._max_restarts:
            counts = Counter(cause for _, cause in self._causes)
            listed = "\n".join(f"  {count} x {cause}" for cause, count in counts.most_common())
            error = TooManyRestartsError(
                f"{len(self._causes)} failures within {self._window_s:g} s, cluster.max_restarts is "
                f"{self._max_restarts}:\n{listed}"
            )
            if not self._exceeded.done():
                self._exceeded.set_exception(error)
                self._exceeded.exception()  # seen: ``error`` is raised here too
            raise error

    async def guard(self, work: Coroutine[object, object, T], *beside: Coroutine[object, object, Never]) -> T:
        """Await ``work``, unless there is one restart too many first, wherever it is counted, or something that goes on
        ``beside`` it raises.

        Raises:
            TooManyRestartsError: then all of these are cancelled.
        """
        working = asyncio.create_task(work)
        others = [asyncio.create_task(one) for one in beside]
        ends: list[asyncio.Future[Any]] = [self._exceeded, *others, working]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for ended in ends[:-1]:
                if ended.done():
                    await ended
            return await working
        finally:
            for task in (working, *others):
                task.cancel()
            await asyncio.gather(working, *others, return_exceptions=True)
