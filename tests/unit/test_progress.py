"""Where a run goes back to when its learner is lost, and what it keeps when it goes on."""

from dataclasses import replace
from types import SimpleNamespace

import fakes

from eopd.ledger import Ledger
from eopd.run import progress as module
from eopd.run.checkpoint import DriverState
from eopd.run.progress import Progress
from eopd.run.record import Summary


def test_a_lost_learner_rolls_back_as_another_incarnation():
    progress = Progress(
        step=9,
        tokens=90,
        trajectories=72,
        skipped_steps=2,
        wall_before_s=100.0,
    )
    state = DriverState(
        step=5,
        tokens=50,
        trajectories=40,
        skipped_steps=1,
        wall_s=3.0,
        ledger=Ledger().state(),
    )
    progress.roll_back(state)
    assert progress.step == 5
    assert progress.tokens == 50
    assert progress.trajectories == 40
    assert progress.skipped_steps == 1
    assert progress.incarnation == 1
    assert progress.learner_restarts == 1
    progress.roll_back(None)
    assert (progress.step, progress.tokens, progress.trajectories, progress.skipped_steps) == (
        0,
        0,
        0,
        0,
    )
    assert (progress.incarnation, progress.learner_restarts) == (2, 2)
    assert progress.wall_s >= 100.0 and progress.summary("running").incarnation == 2
    resumed = Progress.resume(state, progress.summary("running"))
    assert (resumed.incarnation, resumed.learner_restarts) == (3, 2)


def test_a_row_says_what_the_newest_checkpoint_is_and_took():
    progress = Progress(
        step=9,
        tokens=90,
        trajectories=72,
        skipped_steps=2,
        config_changes=3,
    )
    row = dict(progress.row())
    assert 0.0 <= row.pop("eopd_checkpoint_age_seconds") < 60.0
    assert 0.0 <= row.pop("eopd_run_seconds_total") < 60.0
    assert row == {
        "eopd_response_tokens_total": 90.0,
        "eopd_trajectories_total": 72.0,
        "eopd_learner_restarts_total": 0.0,
        "eopd_skipped_steps_total": 2.0,
        "eopd_config_changes_total": 3.0,
    }
    state = DriverState(
        step=5,
        tokens=5,
        trajectories=4,
        skipped_steps=1,
        wall_s=3.0,
        ledger=Ledger().state(),
    )
    assert Progress.resume(state, progress.summary("running")).row()["eopd_checkpoint_step"] == 5.0
    progress.count_checkpoint(1.5, 4096)
    assert progress.row()["eopd_checkpoint_step"] == 9.0
    assert progress.row()["eopd_checkpoint_seconds"] == 1.5
    assert progress.row()["eopd_checkpoint_bytes"] == 4096.0
    progress.roll_back(state)
    assert progress.row()["eopd_checkpoint_step"] == 5.0
    progress.roll_back(None)
    assert "eopd_checkpoint_step" not in progress.row()


def test_a_checkpoint_keeps_what_the_paths_stood_for():
    assert Progress().state(Ledger(), {"prompts.data": "abc"}).inputs == {"prompts.data": "abc"}


def test_the_age_of_a_checkpoint_begins_anew_with_each(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress(step=1, _saved=100.0)
    now[0] = 160.0
    assert progress.row()["eopd_checkpoint_age_seconds"] == 60.0
    progress.count_checkpoint(1.0, 1)
    now[0] = 165.0
    assert progress.row()["eopd_checkpoint_age_seconds"] == 5.0


def test_a_run_that_goes_on_keeps_how_long_its_steps_took():
    summary = Summary(
        status="completed", steps=4, tokens=400, tokens_per_s=50.0, step_seconds={"train": 1.5}
    )
    state = replace(fakes.driver_state(4), tokens=400)
    again = Progress.resume(state, summary).summary("completed")
    assert (again.tokens_per_s, again.step_seconds["train"]) == (50.0, 1.5)

    silent = Progress.resume(replace(state, tokens=0), summary).summary("completed")
    assert silent.tokens_per_s == 0.0

    nothing = Progress.resume(state, Summary(status="running")).summary("completed")
    assert (nothing.tokens_per_s, nothing.step_seconds["train"]) == (0.0, 0.0)
