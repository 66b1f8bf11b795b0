"""Progress is how far a run has come: it makes the run's ``summary.json`` and checkpoint state."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from eopd.ledger import Ledger
from eopd.run.checkpoint import DriverState
from eopd.run.record import Best, HeldOut, Measurement, Row, Summary
from eopd.types import StepDone

STAGES = ("generate", "score", "train", "weights", "wait")


@dataclass(slots=True)
class Progress:
    """Progress counts the steps of a run, over all its processes, with their tokens and seconds."""

    step: int = 0
    tokens: int = 0
    trajectories: int = 0
    skipped_steps: int = 0
    newly_skipped: int = 0  # by the step that was counted last
    incarnation: int = 0
    learner_restarts: int = 0
    config_changes: int = 0
    checkpoint_step: int | None = None
    checkpoint_s: float | None = None
    checkpoint_bytes: int | None = None
    wall_before_s: float = 0.0
    before: Mapping[str, Measurement] | None = None
    after: Mapping[str, Measurement] | None = None
    best: Best | None = None
    _started: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _rows: int = 0
    _timed_tokens: int = 0
    _seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("step", *STAGES), 0.0)
    )

    @classmethod
    def resume(cls, state: DriverState, summary: Summary) -> "Progress":
        """Returns the progress at a checkpoint, under a new incarnation; the measurement before
        training is kept, and so are the mean times of its steps.
        """
        rate = summary.tokens_per_s
        means = summary.step_seconds if rate else {}
        seconds = {stage: mean * state.step for stage, mean in means.items()}
        if rate:
            seconds["step"] = state.tokens / rate

        return cls(
            _seconds=dict.fromkeys(("step", *STAGES), 0.0) | seconds,
            _rows=state.step if rate else 0,
            _timed_tokens=state.tokens if rate else 0,
            incarnation=summary.incarnation + 1,
            learner_restarts=summary.learner_restarts,
            step=state.step,
            tokens=state.tokens,
            trajectories=state.trajectories,
            skipped_steps=state.skipped_steps,
            checkpoint_step=state.step,
            wall_before_s=state.wall_s,
            before=summary.held_out.before,
        )

    def roll_back(self, state: DriverState | None) -> None:
        """Goes back to a checkpoint, or to the beginning, under a new incarnation. The time that has
        passed still counts.
        """
        self.step = state.step if state else 0
        self.tokens = state.tokens if state else 0
        self.trajectories = state.trajectories if state else 0
        self.skipped_steps = state.skipped_steps if state else 0
        self.checkpoint_step = state.step if state else None
        self.incarnation += 1
        self.learner_restarts += 1

    @property
    def wall_s(self) -> float:
        """Returns the seconds of the run so far, over all its processes."""
        return self.wall_before_s + time.monotonic() - self._started

    def count(self, done: StepDone) -> None:
        """Counts one completed step."""
        tokens = sum(header.num_response_tokens for header in done.trained.values())
        self.step = done.stats.version.step
        self.tokens += tokens
        self.trajectories += len(done.trained)
        self.newly_skipped = done.stats.skipped_steps - self.skipped_steps
        self.skipped_steps = done.stats.skipped_steps
        self._rows += 1
        self._timed_tokens += tokens
        for stage in self._seconds:
            self._seconds[stage] += done.seconds[stage]

    def count_checkpoint(self, seconds: float, num_bytes: int) -> None:
        """Counts the checkpoint of this step, which was just written."""
        self.checkpoint_step = self.step
        self.checkpoint_s, self.checkpoint_bytes = seconds, num_bytes
        self._saved = time.monotonic()

    def row(self) -> Row:
        """Returns the metrics of the run so far that every row has."""
        row = {
            "eopd_run_seconds_total": self.wall_s,
            "eopd_response_tokens_total": float(self.tokens),
            "eopd_trajectories_total": float(self.trajectories),
            "eopd_learner_restarts_total": float(self.learner_restarts),
            "eopd_skipped_steps_total": float(self.skipped_steps),
            "eopd_config_changes_total": float(self.config_changes),
            "eopd_checkpoint_age_seconds": time.monotonic() - self._saved,
        }
        if self.checkpoint_step is not None:
            row["eopd_checkpoint_step"] = float(self.checkpoint_step)

        if self.checkpoint_s is not None:
            row["eopd_checkpoint_seconds"] = self.checkpoint_s

        if self.checkpoint_bytes is not None:
            row["eopd_checkpoint_bytes"] = float(self.checkpoint_bytes)

        return row

    def state(self, ledger: Ledger, inputs: Mapping[str, str]) -> DriverState:
        """Returns the driver's part of a checkpoint."""
        return DriverState(
            step=self.step,
            tokens=self.tokens,
            trajectories=self.trajectories,
            skipped_steps=self.skipped_steps,
            wall_s=self.wall_s,
            ledger=ledger.state(),
            inputs=inputs,
        )

    def summary(self, status: str) -> Summary:
        """Returns what ``summary.json`` holds."""
        rows, seconds = max(self._rows, 1), self._seconds["step"]
        return Summary(
            status=status,
            steps=self.step,
            tokens=self.tokens,
            skipped_steps=self.skipped_steps,
            incarnation=self.incarnation,
            learner_restarts=self.learner_restarts,
            wall_s=round(self.wall_s, 3),
            tokens_per_s=self._timed_tokens / seconds if seconds else 0.0,
            step_seconds={stage: self._seconds[stage] / rows for stage in STAGES},
            held_out=HeldOut(before=self.before, after=self.after),
            best=self.best,
        )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message. That of a worker's error may hold a traceback, so
    that its cause is used.
    """
    cause = getattr(error, "cause", None) or error
    text = str(cause) or ("no answer in time" if isinstance(error, TimeoutError) else "")
    return text.splitlines()[0] if text else type(cause).__name__
