"""The state of a run in one process: what it continues from, what it forgets, what it leaves behind."""

import json
from dataclasses import replace

import fakes
import pytest

from eopd.config import load_config
from eopd.roles import LearnerDownError
from eopd.run.checkpoint import MANIFEST, list_checkpoints
from eopd.run.directory import RunDirectory
from eopd.run.progress import Progress
from eopd.run.storage import StorageError
from eopd.run.upload import Uploads
from eopd.runtime.resume import take_up
from eopd.runtime.state import RunState
from eopd.types import LostReason, LostTrajectory, PolicyVersion, RunFailedError

INPUTS = {"prompts.data": "1", "student.model": "2"}


class Learner:
    """Saves its weights, or raises ``error``."""

    def __init__(self, error=None, step=0):
        self.error = error
        self.step = step
        self.num_saves = 0

    async def version(self):
        return PolicyVersion(0, self.step)

    async def save(self, directory):
        if self.error is not None:
            raise self.error

        self.num_saves += 1
        await fakes.save_weights(directory)


@pytest.fixture
def config(tmp_path):
    path = fakes.write_config(tmp_path, batches=20, more="checkpoint: {every: 4}")
    return load_config(path)


def begin(config) -> RunState:
    taken_up = take_up(config, INPUTS)
    taken_up.begin()
    return RunState(taken_up, Uploads(taken_up.config, print))


async def interrupted(config, *, checkpoint: int, last: int) -> RunDirectory:
    """A run that stopped at step ``last``, with one checkpoint."""
    directory = RunDirectory.create(config)
    rows = [{"step": step} for step in range(1, last + 1)]
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    await fakes.save_checkpoint(
        directory.checkpoints, fakes.driver_state(checkpoint, per_step=8, inputs=INPUTS)
    )
    directory.write_summary(Progress(step=last).summary("interrupted"))
    return directory


def steps(directory):
    return [row["step"] for row in fakes.read_rows(directory.metrics)]


async def test_until_it_goes_on_a_resumed_run_stands_as_it_stood(config):
    directory = await interrupted(config, checkpoint=4, last=6)
    state = RunState(take_up(config, INPUTS, "yes"), Uploads(config, print))
    assert state.checkpoint == directory.checkpoints / "step-000004"
    assert state.end("failed").status == "failed"
    assert directory.read_summary().status == "interrupted"
    assert steps(directory) == [1, 2, 3, 4, 5, 6]

    state.go_on()
    assert directory.read_summary().status == "running"
    assert steps(directory) == [1, 2, 3, 4]
    state.end("failed")
    assert directory.read_summary().status == "failed"


async def test_a_lost_learner_goes_back_to_the_newest_checkpoint(config):
    state = begin(config)
    learner = Learner()
    state.progress.step = 4
    await state.save(learner)
    state.progress.step = 6
    state.directory.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 7)))
    lost = LostTrajectory(
        key=fakes.header().key, reason=LostReason.ROLLOUT_FAILED, detail="refused"
    )
    state.directory.add_dropped(2, lost)
    state.directory.add_dropped(3, replace(lost, reason=LostReason.FILTERED))
    state.roll_back()

    assert state.progress.step == 4
    assert (state.ledger.num_filtered, state.ledger.filtered_ahead) == (1, {3})
    assert state.progress.incarnation == 1
    assert state.checkpoint == state.directory.checkpoints / "step-000004"
    assert steps(state.directory) == [1, 2, 3, 4]
    assert state.ledger.dropped == {2}, "what was dropped is not tried again"


async def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(config, tmp_path):
    state = begin(config)
    state.progress.step = 4
    await state.save(Learner())
    state.directory.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    state.directory.checkpoints.rename(tmp_path / "away")
    with pytest.raises(RunFailedError, match=r"holds no whole checkpoint of step 4 any more"):
        state.roll_back()

    assert (steps(state.directory), state.progress.step) == ([1, 2, 3, 4], 4)


async def test_a_run_whose_newest_checkpoint_cannot_be_read_goes_no_further_back(config):
    state = begin(config)
    for state.progress.step in (4, 8):
        await state.save(Learner())

    manifest = state.directory.checkpoints / "step-000008" / MANIFEST
    manifest.rename(manifest.with_name("unread"))
    with pytest.raises(RunFailedError, match=r"holds no whole checkpoint of step 8 any more"):
        state.roll_back()


async def test_a_learner_starts_from_the_checkpoint_that_the_run_went_back_to(config):
    state = begin(config)
    for state.progress.step in (4, 8):
        await state.save(Learner())

    state.roll_back()
    chosen = state.directory.checkpoints / "step-000008"
    (chosen / MANIFEST).unlink()  # while the learner starts
    assert (state.checkpoint, state.progress.step) == (chosen, 8)


def test_a_disk_that_takes_no_summary_does_not_hide_why_a_run_failed(config, monkeypatch):
    def full(directory, summary):
        raise StorageError("full")

    state = begin(config)
    monkeypatch.setattr(RunDirectory, "write_summary", full)
    assert state.end("failed").status == "failed"
    with pytest.raises(StorageError, match="full"):
        state.end("completed")


async def test_uploads_are_told_where_training_goes_on(config, monkeypatch):
    told = []
    monkeypatch.setattr(Uploads, "go_back", lambda uploads, step: told.append(step))
    await interrupted(config, checkpoint=4, last=6)
    state = RunState(take_up(config, INPUTS, "yes"), Uploads(config, print))
    assert told == []
    state.go_on()
    assert told == [4]

    state.progress.step = 8
    await state.save(Learner())
    state.progress.step = 9
    state.roll_back()
    assert told == [4, 8]


async def test_a_step_is_saved_once(config):
    state = begin(config)
    learner = Learner()
    await state.save(learner)
    assert learner.num_saves == 0, "before the first step there is nothing to save"

    state.progress.step = 3
    assert not state.is_due
    state.progress.step = 4
    assert state.is_due
    await state.save(learner)
    await state.save(learner)
    assert learner.num_saves == 1
    assert state.progress.checkpoint_step == 4
    files = state.directory.checkpoint(4).rglob("*")
    sizes = [path.stat().st_size for path in files if path.is_file() and path.name != MANIFEST]
    assert state.progress.checkpoint_bytes == sum(sizes) > 0
    assert state.directory.read_summary().steps == 4


async def test_what_says_which_steps_were_trained_is_on_disk_before_the_checkpoint(
    config, monkeypatch
):
    """A machine that loses its power keeps no checkpoint whose rows it has lost."""
    state, forced = begin(config), []
    directory = state.directory
    monkeypatch.setattr("eopd.run.storage.force", lambda path: forced.append(path.name))
    monkeypatch.setattr("eopd.run.checkpoint.force", lambda path: forced.append(path.name))
    for path in (directory.trained, directory.metrics, directory.evaluations):
        path.touch()

    state.progress.step = 4
    await state.save(Learner())
    rows = {"trained.jsonl", "metrics.jsonl", "evaluations.jsonl"}
    assert set(forced[:3]) == rows and rows.isdisjoint(forced[3:])


@pytest.mark.parametrize("error", [StorageError("full"), LearnerDownError("a rank died")])
async def test_a_save_that_fails_hides_no_error(config, error, caplog):
    state = begin(config)
    state.progress.step = 4
    await state.save_in_spite_of(RuntimeError("first"), Learner(error, step=4))
    assert list_checkpoints(state.directory.checkpoints) == []
    assert "RuntimeError('first')" in caplog.text


async def test_what_was_trained_before_an_error_is_saved(config):
    state = begin(config)
    state.progress.step = 3
    await state.save_in_spite_of(RuntimeError("first"), Learner(step=4))
    assert list_checkpoints(state.directory.checkpoints) == [], "the rows end with step 3"
    await state.save_in_spite_of(RuntimeError("first"), Learner(step=3))
    assert [path.name for path in list_checkpoints(state.directory.checkpoints)] == ["step-000003"]
