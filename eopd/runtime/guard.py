"""The guard of a run: what is done about what ``telemetry/guard.py`` finds in its rows."""

from collections.abc import Callable, Mapping
from typing import Literal

from eopd.config import ConfigError
from eopd.run.checkpoint import list_checkpoints, step_of
from eopd.run.directory import RunDirectory
from eopd.run.reading import read_rows, up_to_step
from eopd.run.record import Row
from eopd.telemetry.guard import Collapse, Guard

OnCollapse = Literal["off", "warn", "stop"]


class RunGuard:
    """Says once for each collapse that it has begun, and whether it ends the run.

    Args:
        on_collapse: ``guard.on_collapse``.
        directory: where the rows of the run so far are.
        say: is called with messages for people.
    """

    def __init__(
        self,
        on_collapse: OnCollapse,
        directory: RunDirectory,
        say: Callable[[str], None],
    ) -> None:
        self._on_collapse = on_collapse
        self._directory = directory
        self._say = say
        self._guard = Guard()

    def go_on_from(self, step: int) -> None:
        """Reads the rows of the run up to a step; what it read before is forgotten."""
        if self._on_collapse != "off":
            self._guard = guard_at(self._directory, step)

    def take(self, row: Row) -> Mapping[str, float]:
        """Reads the row of a step, and says that a collapse has begun with it; returns what the
        guard adds to that row.
        """
        if self._on_collapse == "off":
            return {}

        begins = self._guard.take(row)
        if (collapse := self._guard.collapse) is not None and begins:
            self._say(f"{collapse}. {advice(self._directory, collapse)}")

        return {"eopd_collapse": float(collapse is not None)}

    def spared(self) -> int | None:
        """Returns the step of the checkpoint to go back to from a collapse under way, or None."""
        collapse = self._guard.collapse
        return None if collapse is None else checkpoint_before(self._directory, collapse)

    @property
    def ending(self) -> Collapse | None:
        """Returns the collapse that ends the run, or None."""
        return self._guard.collapse if self._on_collapse == "stop" else None

    def say_last_words(self) -> None:
        """Says why the run has ended, where a collapse has ended it, and what to do."""
        if (collapse := self.ending) is None:
            return

        summary = self._directory.read_summary()
        best = summary.best if summary else None
        kept = f", hf-best/ the best that was measured, of step {best.step}" if best else ""
        self._say(
            "the guard has ended the run (guard.on_collapse is stop); hf/ is the student as it is "
            f"now{kept}. {advice(self._directory, collapse)}"
        )


def guard_at(directory: RunDirectory, step: int) -> Guard:
    """Returns the guard that has read the rows of a run up to a step."""
    return Guard.replay(up_to_step(read_rows(directory.metrics), step))


def require_no_collapse(directory: RunDirectory, step: int) -> None:
    """Refuses to go on from a step at which the student has collapsed: the run would end again.

    Raises:
        ConfigError: it has; the message has what can be done.
    """
    if (collapse := guard_at(directory, step).collapse) is not None:
        raise ConfigError(
            f"guard.on_collapse: is stop, and at step {step} of {directory.path} {collapse}. "
            f"{advice(directory, collapse)}; or go on with --set guard.on_collapse=warn"
        )


def checkpoint_before(directory: RunDirectory, collapse: Collapse) -> int | None:
    """Returns the step of the newest checkpoint from the best steps, or before, or None."""
    steps = map(step_of, list_checkpoints(directory.checkpoints))
    return max((step for step in steps if step <= collapse.best.last_step), default=None)


def advice(directory: RunDirectory, collapse: Collapse) -> str:
    """Returns what to do about a collapse."""
    best = collapse.best.last_step
    if (step := checkpoint_before(directory, collapse)) is None:
        return (
            f"The best steps end with {best}, and no checkpoint from there is left "
            "(checkpoint.every, checkpoint.keep_last); see docs/runbook.md#collapse"
        )

    return (
        f"The best steps end with {best}; go back with --resume --step {step}, and see "
        "docs/runbook.md#collapse"
    )
