"""How far a run is, and how that gets to disk: its progress, its ledger, its checkpoints and its
summary.

    TakenUp ──▶ RunState ── go_on ── keep ── save ── record ── export ── end
                   ▲                           │
                   └─ roll_back ◀── the newest checkpoint
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from eopd.config.benchmark import HELD_OUT
from eopd.ledger import Ledger
from eopd.roles import LearnerDownError
from eopd.run.checkpoint import (
    DriverState,
    list_checkpoints,
    remove_old,
    size_of,
    step_of,
    write_checkpoint,
)
from eopd.run.evaluations import (
    Evaluation,
    append_evaluation,
    best_checkpoints,
    read_evaluations,
)
from eopd.run.progress import Progress
from eopd.run.record import Best, Summary
from eopd.run.storage import StorageError
from eopd.run.upload import Uploads
from eopd.runtime.gang import LearnerGang
from eopd.runtime.logs import logger
from eopd.runtime.resume import TakenUp
from eopd.types import RunFailedError, StepDone


class RunState:
    """The state of a run in this process, from where it takes the run up.

    Args:
        taken_up: the run, and the checkpoint it continues from.
        uploads: those of this process.
    """

    def __init__(self, taken_up: TakenUp, uploads: Uploads) -> None:
        state, summary = taken_up.state, taken_up.summary
        self.directory = taken_up.directory
        self.progress = Progress.resume(state, summary) if state and summary else Progress()
        self.progress.config_changes = taken_up.total_changes
        self.ledger = self._ledger_of(state)
        self.evaluations: list[Evaluation] = []  # see ``_remember``
        self.uploads = uploads
        self._taken_up = taken_up
        self._checkpointing = taken_up.config.checkpoint
        self._evaluation = taken_up.config.evaluation
        self._candidates: set[int] = set()  # steps whose measurement is not known yet
        # returns the step of a checkpoint to go back to, which stays whatever ``keep_last`` says
        self.spared: Callable[[], int | None] = lambda: None
        self._goes_on = taken_up.checkpoint is None
        self.checkpoint = taken_up.checkpoint  # what a learner starts from; None at the beginning

    def go_on(self) -> None:
        """Gives up what came after the checkpoint that the run continues from; until then the run
        stands as it stood.
        """
        if not self._goes_on:
            self._taken_up.carry_out()
            self.uploads.go_back(self.progress.step)
            self._goes_on = True
            self._read_evaluations()
            self.write_summary()

    def roll_back(self) -> None:
        """Forgets what came after the newest checkpoint: it is issued again, under a new
        incarnation.

        Raises:
            RunFailedError: it is gone, or cannot be read.
        """
        if self._goes_on:
            whole = list_checkpoints(self.directory.checkpoints)
            self.checkpoint = next(reversed(whole), None)

        step = self.progress.checkpoint_step or 0
        if step > (step_of(self.checkpoint) if self.checkpoint else 0):
            raise RunFailedError(
                f"{self.directory.checkpoints} holds no whole checkpoint of step {step} any more; "
                "nothing was removed. Bring it back, then continue with --resume"
            )

        state = DriverState.read(self.checkpoint) if self.checkpoint else None
        self.progress.roll_back(state)
        self.ledger = self._ledger_of(state)
        if self._goes_on:
            self.uploads.go_back(self.progress.step)
            self.directory.drop_rows_after(self.progress.step)
            self._read_evaluations()
            self.write_summary()

    def keep(self, done: StepDone) -> None:
        """Records a completed step, apart from its row."""
        self.directory.add_trained(self.progress.step, done.trained)
        try:
            self.directory.add_timeline(
                self.progress.step,
                self.progress.incarnation,
                done.spans,
            )
        except OSError:  # people look at it; nothing else may be lost with it
            logger.warning(
                "the timeline of step %d was not kept", self.progress.step, exc_info=True
            )

    def record(self, evaluation: Evaluation) -> None:
        """Records a measurement, and removes the checkpoints that it makes needless.

        Raises:
            StorageError: the disk did not take it.
        """
        append_evaluation(self.directory.evaluations, evaluation)
        self._remember(evaluation)
        if evaluation.name == HELD_OUT and evaluation.phase == "before":
            self.progress.before = evaluation.measurements

        if evaluation.name == HELD_OUT and evaluation.phase == "after":
            self.progress.after = evaluation.measurements

        if evaluation.name == self._compared:
            self._candidates.discard(evaluation.step)
            self.progress.best = next(iter(self._best()), None)
            remove_old(
                self.directory.checkpoints, self._checkpointing.keep_last, self._worth_keeping()
            )

        self.write_summary()

    def is_measured(self, name: str) -> bool:
        """Returns whether a name was measured at this step."""
        step = self.progress.step
        return any(one.name == name and one.step == step for one in self.evaluations)

    def expect(self, names: Collection[str]) -> None:
        """Keeps this step's checkpoint until what will be measured under these names is known."""
        if self._compared in names:
            self._candidates.add(self.progress.step)

    def expect_no_more(self, names: Collection[str]) -> None:
        """Keeps no checkpoint any more for measurements of these names, which will not come."""
        if self._compared in names:
            self._candidates.clear()

    @property
    def is_due(self) -> bool:
        """Returns whether a checkpoint is to be written after this step."""
        return self.progress.step % self._checkpointing.every == 0 or self._is_candidate

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
        self.directory.force_rows()  # what proves the checkpoint survives whatever it survives
        written = await write_checkpoint(
            self.directory.checkpoints,
            progress.state(self.ledger, self._taken_up.inputs),
            learner.save,
            keep_last=self._checkpointing.keep_last,
            keep=self._worth_keeping,
        )
        self.uploads.wake()
        progress.count_checkpoint(time.monotonic() - started, size_of(written))
        self.write_summary()

    async def save_in_spite_of(self, error: Exception, learner: LearnerGang) -> None:
        """Writes a checkpoint of what was trained before ``error``, which stays the one to report; none
        where the learner has made a step that was not counted.
        """
        try:
            if (version := await learner.version()).step != self.progress.step:
                logger.warning("not saved: the learner is at step %d already", version.step)
                return

            await self.save(learner)
        except (StorageError, LearnerDownError):
            logger.warning("the steps before %r could not be saved", error, exc_info=True)

    async def export(self, learner: LearnerGang) -> None:
        """Writes the student that the learner holds, and the best one, for which the learner loads its
        checkpoint.

        Raises:
            LearnerDownError: the learner was lost.
        """
        directory = self.directory
        await learner.export(directory.hf, directory.adapter)
        if (best := self.progress.best) is None:
            return

        if best.step != self.progress.step:
            await learner.load(directory.checkpoint(best.step) / "learner")

        await learner.export(directory.hf_best, directory.adapter_of_best)

    def write_summary(self) -> None:
        """Writes the summary of a run that goes on."""
        self.directory.write_summary(self.progress.summary("running"))

    def end(self, status: str) -> Summary:
        """Returns the summary of a run that ends, and writes it if the run has gone on.

        Raises:
            StorageError: the disk did not take it; that of a run that has failed is only logged.
        """
        summary = self.progress.summary(status)
        try:
            if self._goes_on:
                self.directory.write_summary(summary)
        except StorageError as error:  # why it failed is what people need
            if status != "failed":
                raise

            logger.warning("%s", error)

        return summary

    @property
    def _compared(self) -> str | None:
        """Returns the name whose measurements are compared to find the best checkpoint."""
        keep_best = self._checkpointing.keep_best
        return None if keep_best is None else keep_best.metric.partition("/")[0]

    @property
    def _is_candidate(self) -> bool:
        """Returns whether this step is measured, and may turn out the best."""
        name = self._compared
        return name is not None and self._evaluation.is_due(name, self.progress.step)

    def _read_evaluations(self) -> None:
        self.evaluations = []
        for evaluation in read_evaluations(self.directory.evaluations):
            self._remember(evaluation)

        self._candidates.clear()
        self.progress.best = next(iter(self._best()), None)

    def _remember(self, evaluation: Evaluation) -> None:
        """Keeps a measurement in memory; the numbers of single prompts only of the first of each name,
        with which the later ones are compared.
        """
        if any(one.name == evaluation.name for one in self.evaluations):
            evaluation = replace(evaluation, by_prompt={})

        self.evaluations.append(evaluation)

    def _best(self) -> Sequence[Best]:
        return best_checkpoints(
            self.directory.checkpoints, self.evaluations, self._checkpointing.keep_best
        )

    def _worth_keeping(self) -> set[int]:
        """Returns the steps of checkpoints that stay beside the newest: one that is being uploaded or is
        spared, the best, those that may turn out so, and the newest of those that
        ``checkpoint.every`` asks for.
        """
        needed = self.uploads.needed()
        if (spared := self.spared()) is not None:
            needed.add(spared)

        if self._compared is None:
            return needed

        every, keep_last = self._checkpointing.every, self._checkpointing.keep_last
        whole = map(step_of, list_checkpoints(self.directory.checkpoints))
        regular = [step for step in whole if step % every == 0]
        best = {best.step for best in self._best()}
        return {*needed, *regular[-keep_last:], *best, *self._candidates}

    def _ledger_of(self, state: DriverState | None) -> Ledger:
        """Returns the ledger of a checkpoint, or a new one; what was dropped since is not tried
        again.
        """
        ledger = Ledger.restore(**state.ledger) if state else Ledger()  # type: ignore[arg-type]
        ledger.drop_again(*self.directory.dropped_issues())
        return ledger
