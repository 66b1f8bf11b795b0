"""How many losses a run survives: each lost worker is counted once, and too many within a
window end the run.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from eopd.types import RunFailedError

WORKERS = 8  # that ``cluster.max_restarts`` is meant for; a larger run may lose more


class TooManyRestartsError(RunFailedError):
    """More losses within the window than a run may have; names their causes."""


class RestartBudget:
    """At most ``max_restarts`` lost workers for every ``WORKERS`` that a run has, within
    ``window_s`` seconds.

    Args:
        max_restarts: of a run with up to ``WORKERS`` workers.
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

    def spend(self, cause: str) -> None:
        """Count one lost worker.

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
