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

    def count_loss(self, cause: str) -> None:
        """Counts one lost worker.

        Raises:
            TooManyRestartsError: it is one too many.
        """
        now = time.monotonic()
        self._causes.append((now, cause))
        while self._causes[0][0] < now - self._window_s:
            self._causes.popleft()

        workers = self.num_workers()
        limit = self._max_restarts * math.ceil(workers / WORKERS)
        if len(self._causes) <= limit:
            return

        counts = Counter(cause for _, cause in self._causes)
        listed = "\n".join(f"  {count} x {cause}" for cause, count in counts.most_common())
        share = "" if workers <= WORKERS else f" for every {WORKERS} of {workers} workers"
        raise TooManyRestartsError(
            f"{len(self._causes)} failures within {self._window_s:g} s, cluster.max_restarts is "
            f"{self._max_restarts}{share}:\n{listed}"
        )
