"""Where the time of a step goes: each moment of it is the learner's work, a wait, or the weights' way
to the engines.

    started          trained             ended
       │ wait │ train │  weights  │train│   │        train: the learner works, here also on parts of
       └──────────────┴───────────┴─────┴───┘        the next batch, once the weights are sent

Until the last response of the batch is written the learner waits for the engines, from then on for
the teacher.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from eopd.types import Span


class BusyClock:
    """Records when at least one request was under way, by ``clock``: a context manager that is
    entered around each request.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._active = 0
        self._since = 0.0
        self._spans: list[Span] = []

    def __enter__(self) -> None:
        if self._active == 0:
            self._since = self._clock()

        self._active += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active -= 1
        if self._active == 0:
            self._spans.append((self._since, self._clock()))

    def lap(self, origin: float = 0.0) -> list[Span]:
        """Returns the spans since the last lap, from and to, in seconds since ``origin`` on the
        clock.
        """
        now = self._clock()
        spans = [*self._spans, (self._since, now)] if self._active else self._spans
        self._spans, self._since = [], now
        return [(start - origin, stop - origin) for start, stop in spans]


def within(spans: Sequence[Span], start: float, stop: float) -> Sequence[Span]:
    """Returns what of the spans lies between two times."""
    cut = [(max(a, start), min(b, stop)) for a, b in spans]
    return [(a, b) for a, b in cut if a < b]


def gaps(start: float, spans: Sequence[Span], stop: float) -> Sequence[Span]:
    """Returns what lies between two times and in none of the spans, which are in order."""
    starts = [start, *(end for _, end in spans)]
    stops = [*(begin for begin, _ in spans), stop]
    return list(zip(starts, stops, strict=True))


class StepClock:
    """A step clock records when engines, teacher and learner work, and accounts for every moment of a
    step.

    ``generating`` and ``scoring`` are entered around each request.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.generating, self.scoring = BusyClock(clock), BusyClock(clock)
        self._clock = clock
        self._generated_at: dict[int, float] = {}  # by issue number, until it is trained
        self._works: list[Span] = []
        self._started = self._trained = 0.0
        self._ended: float | None = None  # the step before

    def generated(self, issue: int) -> None:
        """Notes that the response of a trajectory is written."""
        self._generated_at[issue] = self._clock()

    def forget(self, issue: int) -> None:
        """Forgets a trajectory that will not be trained."""
        self._generated_at.pop(issue, None)

    def start(self) -> None:
        """Begins a step."""
        self._started = self._clock()

    def learned(self, since: float) -> None:
        """Notes that the learner has worked from ``since``, on the clock, until now."""
        self._works.append((since, self._clock()))

    def trained(self) -> None:
        """Notes that the learner has stepped: its weights are on their way from now on."""
        self._trained = self._clock()

    def end(
        self, issues: Collection[int]
    ) -> tuple[Mapping[str, Sequence[Span]], Mapping[str, float]]:
        """Ends the step that has trained ``issues``.

        Returns:
            When what went on, in seconds since the step began, and how many seconds that was.
        """
        started, ended = self._started, self._clock()
        trained = self._trained - started
        generated = max(self._generated_at.pop(issue) for issue in issues) - started

        works = [(start - started, stop - started) for start, stop in self._works]
        self._works = []
        idle = gaps(0.0, works, ended - started)
        spans = {
            "generate": self.generating.lap(started),
            "score": self.scoring.lap(started),
            "wait_rollout": within(idle, 0.0, min(generated, trained)),
            "wait_teacher": within(idle, max(generated, 0.0), trained),
            "train": works,
            "weights": within(idle, trained, math.inf),
        }

        seconds = {name: sum(stop - start for start, stop in of) for name, of in spans.items()}
        seconds["wait"] = seconds["wait_rollout"] + seconds["wait_teacher"]
        seconds["step"] = ended - started
        seconds["between_steps"] = 0.0 if self._ended is None else started - self._ended
        self._ended = ended
        return spans, seconds
