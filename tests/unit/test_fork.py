"""A fork is a run that looks as if its parent had been stopped at a step, and goes on under other
settings.
"""

import errno
import json
import os
import shutil
from dataclasses import replace

import fakes
import pytest

from eopd.config import ConfigError, load_config
from eopd.ledger import Ledger, Watermark
from eopd.preflight import prepare
from eopd.run.checkpoint import link_checkpoint, list_checkpoints
from eopd.run.directory import RunDirectory
from eopd.run.parent import forgets_moments_at, read_parent
from eopd.run.record import HeldOut, Measurement, Summary
from eopd.runtime.fork import fork
from eopd.runtime.inputs import digests
from eopd.runtime.resume import take_up

BEFORE = {"reverse_kl": Measurement(mean=2.0, standard_error=0.1)}


@pytest.fixture
def path(tmp_path, checked_model):
    more = "learner: {token_budget: 9000, lr: 1.0e-5}"
    return fakes.write_whole_config(tmp_path, checked_model, batches=20, more=more)


@pytest.fixture
async def parent(path):
    """A run with rows up to step 13, checkpoints of steps 4, 8 and 12, and another rate from step 9
    on.
    """
    config = load_config(path)
    inputs = digests(config, prepare(config))
    directory = RunDirectory.create(config)
    held_out = HeldOut(before=BEFORE, after=BEFORE)
    summary = Summary(status="running", steps=13, incarnation=3, held_out=held_out)
    directory.write_summary(summary)
    lost = {5: "timeout", 6: "filtered", 100: "timeout", 101: "filtered"}
    rows = [{"issue": issue, "reason": reason} for issue, reason in lost.items()]
    directory.dropped.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for step in (4, 8):
        await keep(directory, step, inputs)

    faster = load_config(path, ["learner.lr=2.0e-5"])
    take_up(faster, inputs, "yes").carry_out()
    await keep(directory, 12, inputs)
    lines = [json.dumps({"step": step, "text": "é"}) + "\n" for step in range(1, 14)]
    directory.metrics.write_text("".join(lines))

    return directory


async def keep(directory, step, inputs):
    ledger = Ledger(Watermark(8 * step), dropped={5}, num_filtered=1)
    state = replace(fakes.driver_state(step, inputs=inputs), ledger=ledger.state())
    await fakes.save_checkpoint(directory.checkpoints, state)


def refusal(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        fork(*arguments, **options)

    return str(caught.value)


def contents(root):
    """Every file below a directory, with its bytes."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


async def test_a_fork_is_taken_up_as_if_it_had_been_stopped_there(parent, path):
    before = contents(parent.path)
    child = fork(parent.path, name="new", step=8, overrides=["learner.lr=5.0e-5"])
    assert contents(parent.path) == before
    assert child.path == parent.path.with_name("new")
    assert [row["step"] for row in fakes.read_rows(child.metrics)] == list(range(1, 9))
    assert fakes.read_rows(child.metrics)[0]["text"] == "é"
    assert [row["issue"] for row in fakes.read_rows(child.dropped)] == [5, 6]

    config = child.config()
    assert (config.run.name, config.learner.lr) == ("new", 5e-5)
    summary = child.read_summary()
    assert (summary.status, summary.steps, summary.incarnation) == ("interrupted", 8, 3)
    assert (summary.held_out.before, summary.held_out.after) == (BEFORE, None)

    taken_up = take_up(config, digests(config, prepare(config)), "auto")
    assert taken_up.checkpoint == child.checkpoints / "step-000008"
    assert Ledger.restore(**taken_up.state.ledger).issue() == 64  # as the parent went on
    # the rate of the parent at step 8, not its later one
    assert taken_up.notes == ["from step 9: learner.lr 1.0e-05 -> 5.0e-05"]
    taken_up.carry_out()
    (change,) = fakes.read_rows(child.path / "changes.jsonl")
    assert (change["from_step"], change["changes"]) == (9, {"learner.lr": [1e-5, 5e-5]})


async def test_it_begins_with_the_settings_that_held_there(parent):
    assert fork(parent.path, name="early", step=8).config().learner.lr == 1e-5
    assert fork(parent.path, name="late", step=12).config().learner.lr == 2e-5


async def test_its_parent_is_recorded(parent):
    child = fork(parent.path, name="new", overrides=["learner.lr=5.0e-5"])
    written = read_parent(child.path)
    assert (written.run, written.name, written.step) == (str(parent.path), "r", 12)
    assert written.changes == {"learner.lr": [2e-5, 5e-5]}
    record = json.loads((child.path / "parent.json").read_text())
    assert (record["run"], record["step"]) == (str(parent.path), 12)
    assert read_parent(parent.path) is None


async def test_earlier_changes_of_the_parent_stay(parent):
    child = fork(parent.path, name="new", overrides=["loss.gate=never"])
    assert child.num_changes(12) == 1
    assert child.config_at(8).learner.lr == 1e-5
    assert child.config_at(12).loss.gate.kind == "hard"
    assert child.config().learner.lr == 2e-5


async def test_the_optimiser_is_fresh_at_the_first_checkpoint_alone(parent):
    kept = fork(parent.path, name="kept")
    fresh = fork(parent.path, name="fresh", fresh_optimizer=True)
    again = fork(fresh.path, name="again")
    assert [forgets_moments_at(kept.path, step) for step in (12, 16)] == [False, False]
    assert [forgets_moments_at(fresh.path, step) for step in (12, 16)] == [True, False]
    assert forgets_moments_at(again.path, 12)


async def test_a_fork_outlives_the_checkpoint_of_its_parent(parent):
    child = fork(parent.path, name="new", step=8)
    mine, theirs = (run.checkpoints / "step-000008" / "state.json" for run in (child, parent))
    assert os.path.samefile(mine, theirs)
    shutil.rmtree(theirs.parent)
    assert list_checkpoints(child.checkpoints) == [child.checkpoints / "step-000008"]


async def test_a_checkpoint_is_copied_where_it_cannot_be_linked(parent, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "other").mkdir()
    original = parent.checkpoints / "step-000008"
    copy = link_checkpoint(original, tmp_path / "other")
    assert not os.path.samefile(copy / "state.json", original / "state.json")
    assert list_checkpoints(tmp_path / "other") == [copy]


async def test_a_checkpoint_that_goes_away_meanwhile_is_no_checkpoint(parent, monkeypatch):
    link, original = os.link, parent.checkpoints / "step-000008"

    def removed_between_two_files(source, target):
        link(source, target)
        shutil.rmtree(original, ignore_errors=True)

    monkeypatch.setattr(os, "link", removed_between_two_files)
    assert refusal(parent.path, name="new", step=8) == (
        f"{original} was removed meanwhile; name a newer one: --step"
    )
    assert os.listdir(parent.path.parent) == ["r"]


async def test_a_checkpoint_that_was_copied_in_part_is_no_checkpoint(parent, tmp_path):
    original = parent.checkpoints / "step-000008"
    (original / "learner" / "weights").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError):
        link_checkpoint(original, tmp_path / "other")

    assert list_checkpoints(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, "--step 7: {run} has checkpoints of step 4, 8, 12 only"),
        ({"overrides": ["learner.lrr=1"]}, "--set: learner.lrr: "),
        ({"overrides": ["learner.lr"]}, "--set learner.lr: must be section.key=value"),
        ({"overrides": ["run.name=x"]}, "--set run.name=...: the fork is named by --name"),
        ({"overrides": ["run.seed=1"]}, "--set: run.seed 0 -> 1. That would be another run."),
        ({"overrides": ["student.lora=true"]}, "--set: student.lora"),
        ({"overrides": ["learner.zero_stage=3"]}, "--set: learner.zero_stage"),
        ({"overrides": ["prompts.suffix=' and more'"]}, "--set: prompts.data: "),
        (
            {"overrides": ["run.batches=12"]},
            "run.batches: 12 leaves nothing to train after step 12",
        ),
        ({"overrides": ["student.model=/nowhere"]}, "student.model: there is no directory"),
        ({"name": "a/b"}, "--name: must be"),
        ({"name": "r"}, "--name r: {run} is there already; choose another name"),
    ],
)
async def test_what_cannot_be_forked_is_one_message_and_leaves_nothing(parent, options, message):
    around = contents(parent.path.parent)
    found = refusal(parent.path, **{"name": "new"} | options)
    assert found.startswith(message.format(run=parent.path)), found
    assert contents(parent.path.parent) == around
    assert os.listdir(parent.path.parent) == ["r"]


async def run_at_step_4(path, *overrides):
    config = load_config(path, ["student.dtype=float32", *overrides])
    directory = RunDirectory.create(config)
    directory.write_summary(Summary(status="running", steps=4))
    await keep(directory, 4, digests(config, prepare(config)))
    return directory


async def test_a_fork_keeps_the_stage_of_the_checkpoint_under_other_ranks(path):
    directory = await run_at_step_4(path)
    assert directory.config().learner.zero_stage == 0
    for name, override in (
        ("wide", "learner.ranks=2"),
        ("whole", "learner={ranks: 2, token_budget: 9000, lr: 1.0e-5}"),
    ):
        learner = fork(directory.path, name=name, overrides=[override]).config().learner
        assert (learner.ranks, learner.zero_stage) == (2, 0)
        assert learner.zero_stage_reason == "auto: that of the checkpoints"


async def test_a_stage_that_a_fork_is_told_is_told_as_its_own(path):
    directory = await run_at_step_4(path, "learner.ranks=2")
    assert directory.config().learner.zero_stage_reason is not None
    child = fork(directory.path, name="new", overrides=["learner.zero_stage=2"])
    learner = child.config().learner
    assert (learner.zero_stage, learner.zero_stage_reason) == (2, None)


def test_there_is_nothing_to_fork_where_there_is_no_run(tmp_path):
    assert refusal(tmp_path, name="new") == f"{tmp_path} holds no run (it has no config.yaml)"


async def test_another_run_of_the_name_forgets_the_parent(parent, path):
    child = fork(parent.path, name="new")
    shutil.rmtree(child.checkpoints)
    RunDirectory.create(load_config(path, ["run.name=new"]))
    assert read_parent(child.path) is None


async def test_a_moved_parent_has_its_forks_beside_it(parent, tmp_path):
    moved = parent.path.rename(tmp_path / "elsewhere")
    assert fork(moved, name="new").path == tmp_path / "new"
    there = fork(
        moved,
        name="new",
        overrides=[f"run.directory={tmp_path / 'deep' / 'er'}"],
    )
    assert there.path == tmp_path / "deep" / "er" / "new"
