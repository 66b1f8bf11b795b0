"""How far a run is, and how that gets to disk: its progress, its ledger, its checkpoints and its
summary.

    TakenUp ──▶ RunState ── go_on ── keep ── save ── end
                   ▲                          │
                   └─ roll_back ◀── the newest checkpoint
"""

import time
from pathlib import Path
from typing import Literal

from eopd.ledger import Ledger
from eopd.roles import LearnerDownError
from eopd.run.checkpoint import DriverState, StorageError, list_checkpoints, write_checkpoint
from eopd.run.progress import Progress
from eopd.run.record import Measurement, Summary
from eopd.runtime.gang import LearnerGang
from eopd.runtime.logs import logger
from eopd.runtime.resume import TakenUp
from eopd.types import StepDone


class RunState:
    """The state of a run in this process, from where it takes the run up.

    Args:
        taken_up: the run, and the checkpoint it continues from.
    """

    def __init__(self, taken_up: TakenUp) -> None:
        state, summary = taken_up.state, taken_up.summary
        self.directory = taken_up.directory
        self.progress = Progress.resume(state, summary) if state and summary else Progress()
        self.progress.config_changes = taken_up.total_changes
        self.ledger = self._ledger_of(state)
        self._taken_up = taken_up
        self._checkpointing = taken_up.config.checkpoint
        self._goes_on = taken_up.checkpoint is None

    def go_on(self) -> None:
        """Gives up what came after the checkpoint that the run continues from; until then the run
        stands as it stood.
        """
        if not self._goes_on:
            self._taken_up.carry_out()
            self._goes_on = True
            self.write_summary()

    def checkpoint(self) -> Path | None:
        """Returns what a learner starts from; None at the beginning."""
        if not self._goes_on:
            return self._taken_up.checkpoint

        return next(reversed(list_checkpoints(self.directory.checkpoints)), None)

    def roll_back(self) -> None:
        """Forgets what came after the newest checkpoint: it is issued again, under a new
        incarnation.
        """
        checkpoint = self.checkpoint()
        state = DriverState.read(checkpoint) if checkpoint else None
        self.progress.roll_back(state)
        self.ledger = self._ledger_of(state)
        if self._goes_on:
            self.directory.drop_rows_after(self.progress.step)
            self.write_summary()

    def keep(self, done: StepDone) -> None:
        """Records a completed step, apart from its row."""
        self.directory.add_trained(self.progress.step, done.trained)
        try:
            self.directory.add_timeline(self.progress.step, done.spans)
        except OSError:  # people look at it; nothing else may be lost with it
            logger.warning(
                "the timeline of step %d was not kept", self.progress.step, exc_info=True
            )

    def measured(self, phase: Literal["before", "after"], held_out: dict[str, Measurement]) -> None:
        """Records a measurement on held-out prompts."""
        if phase == "before":
            self.progress.before = held_out
        else:
            self.progress.after = held_out

        self.write_summary()

    @property
    def is_due(self) -> bool:
        """Returns whether a checkpoint is to be written after this step."""
        return self.progress.step % self._checkpointing.every == 0

    async def save(self, learner: LearnerGang) -> None:
        """Writes a checkpoint, unless there is one of this step.

        Raises:
            StorageError: it could not be written.
            LearnerDownError: the learner was lost.
        """
        progress = self.progress
        if progress.step <= (progress.checkpoint_step or 0):
            return

        started = time.monotonic()
        await write_checkpoint(
            self.directory.checkpoints,
            progress.state(self.ledger, self._taken_up.inputs),
            learner.save,
            keep_last=self._checkpointing.keep_last,
        )
        progress.checkpoint_s = time.monotonic() - started
        progress.checkpoint_step = progress.step
        self.write_summary()

    async def save_in_spite_of(self, error: Exception, learner: LearnerGang) -> None:
        """Writes a checkpoint of what was trained before ``error``, which stays the one to report."""
        try:
            await self.save(learner)
        except (StorageError, LearnerDownError):
            logger.warning("the steps before %r could not be saved", error, exc_info=True)

    def write_summary(self) -> None:
        """Writes the summary of a run that goes on."""
        self.directory.write_summary(self.progress.summary("running"))

    def end(self, status: str) -> Summary:
        """Returns the summary of a run that ends, and writes it if the run has gone on."""
        summary = self.progress.summary(status)
        if self._goes_on:
            self.directory.write_summary(summary)

        return summary

    def _ledger_of(self, state: DriverState | None) -> Ledger:
        """Returns the ledger of a checkpoint, or a new one; what was dropped since is not tried
        again.
        """
        ledger = Ledger.restore(**state.ledger) if state else Ledger()  # type: ignore[arg-type]
        ledger.drop_again(self.directory.dropped_issues())
        return ledger
