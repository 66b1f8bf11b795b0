"""A run survives a limited number of losses: each lost worker is counted once, and too many within a
window of time end the run.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from eopd.types import RunFailedError

WORKERS = 8  # the workers that ``cluster.max_restarts`` is meant for; a larger run may lose more


class TooManyRestartsError(RunFailedError):
    """More workers were lost within the window than a run may lose; the message has the causes."""


class RestartBudget:
    """A restart budget allows ``max_restarts`` lost workers for every ``WORKERS`` that a run has,
    within ``window_s`` seconds.

    Args:
        max_restarts: the losses that are allowed for up to ``WORKERS`` workers.
        window_s: seconds that a loss counts.
        num_workers: how many workers the run has now: engines, teacher replicas, and the learner's
            gang as one.
    """

    def __init__(
        self, max_restarts: int, window_s: float, num_workers: Callable[[], int] = lambda: 1
    ) -> None:
        self.num_workers = num_workers
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._causes: deque[tuple[float, str]] = deque()

    @property
    def used(self) -> float:
        """Returns the losses that count now, as a share of those that are allowed; 0 where none is."""
        self._forget_old(time.monotonic())
        return len(self._causes) / self._limit if self._limit else 0.0

    @property
    def _limit(self) -> int:
        return self._max_restarts * math.ceil(self.num_workers() / WORKERS)

    def _forget_old(self, now: float) -> None:
        while self._causes and self._causes[0][0] < now - self._window_s:
            self._causes.popleft()

    def count_loss(self, cause: str) -> None:
        """Counts one lost worker.

        Raises:
            TooManyRestartsError: it is one too many.
        """
        now = time.monotonic()
        self._causes.append((now, cause))
        self._forget_old(now)
        workers = self.num_workers()
        if len(self._causes) <= self._limit:
            return

        counts = Counter(cause for _, cause in self._causes)
        listed = "\n".join(f"  {count} x {cause}" for cause, count in counts.most_common())
        share = "" if workers <= WORKERS else f" for every {WORKERS} of {workers} workers"
        raise TooManyRestartsError(
            f"{len(self._causes)} failures within {self._window_s:g} s, cluster.max_restarts is "
            f"{self._max_restarts}{share}:\n{listed}"
        )
