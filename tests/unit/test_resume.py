"""How a run is taken up: begun, continued as itself, or refused with a word on what can be done."""

import json
import re
import sys
from pathlib import Path

import fakes
import pytest

from eopd.config import Config, ConfigError, load_config, processor
from eopd.ledger import Ledger, Watermark
from eopd.run.checkpoint import DriverState, list_checkpoints, write_manifest
from eopd.run.directory import RunDirectory
from eopd.run.progress import Progress
from eopd.runtime.resume import take_up

ROOT = Path(__file__).parents[2]
INPUTS = {
    "prompts.data": "1",
    "prompts.held_out": "2",
    "student.model": "3",
    "teachers.teacher.model": "4",
}


def state(step, inputs=INPUTS):
    return fakes.driver_state(step, per_step=8, inputs=inputs)


@pytest.fixture
def config(tmp_path):
    path = fakes.write_config(
        tmp_path,
        batches=20,
        student="{model: /s}",
        teachers="[{model: /t}]",
        more="learner: {token_budget: 9000}",
    )
    return lambda *overrides: load_config(path, overrides)


async def run_of(config, *steps, status="interrupted", inputs=INPUTS):
    """A run with rows and checkpoints up to some steps."""
    last = max(steps, default=0)
    directory = RunDirectory.create(config)
    add_rows(directory, range(1, last + 1))
    for step in steps:
        await fakes.save_checkpoint(directory.checkpoints, state(step, inputs))

    directory.write_summary(Progress(step=last).summary(status))
    return directory


def add_rows(directory, steps):
    with directory.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def rows(directory):
    return [row["step"] for row in fakes.read_rows(directory.metrics)]


def refusal(config, *arguments, inputs=INPUTS):
    with pytest.raises(ConfigError) as caught:
        take_up(config, inputs, *arguments)

    return str(caught.value)


def texts(changes):
    return [str(change) for change in changes]


def test_where_there_is_nothing_a_run_begins_unless_it_must_go_on(config):
    for resume in ("no", "auto"):
        taken_up = take_up(config(), INPUTS, resume)
        assert taken_up.checkpoint is None
        assert not taken_up.complete
        assert taken_up.notes == []

    taken_up.begin()
    assert taken_up.directory.config() == config()
    other = config("run.name=other")
    assert refusal(other, "yes") == (
        f"--resume: {other.run.path} holds no run; start it without --resume, or with --resume auto"
    )


async def test_a_run_killed_before_its_first_checkpoint_is_started_over(config):
    directory = RunDirectory.create(config())
    assert take_up(config(), INPUTS, "no").notes == []  # no step yet: nothing to lose
    assert "holds 0 steps and no checkpoint to continue from" in refusal(config(), "yes")
    add_rows(directory, [1, 2, 3])
    works = "start it over with --resume auto, or choose another run.name"
    holds = f"{directory.path} holds 3 steps and no checkpoint"
    message = f"{holds} to continue from; {works}"
    assert refusal(config(), "no") == f"run.name: {message}"
    assert refusal(config(), "yes") == f"--resume: {message}"
    taken_up = take_up(config("learner.lr=0.1"), INPUTS, "auto")
    assert taken_up.notes == [f"starting over: {holds}; they are forgotten"]
    assert rows(directory) == [1, 2, 3], "nothing is lost before it begins"
    taken_up.begin()
    assert directory.read_summary().status == "starting"  # also beside a first checkpoint
    assert not directory.metrics.exists()
    assert directory.config().learner.lr == 0.1


async def test_a_run_with_checkpoints_goes_on_from_the_newest(config):
    directory = await run_of(config(), 5, 10)
    add_rows(directory, [11, 12])
    assert refusal(config(), "no") == (
        f"run.name: {directory.path} exists, with checkpoints up to step 10; "
        "continue it with --resume, or choose another name"
    )

    for resume in ("yes", "auto"):
        taken_up = take_up(config(), INPUTS, resume)
        assert taken_up.checkpoint.name == "step-000010"
        assert taken_up.state.step == 10
        assert taken_up.notes == []
        assert taken_up.changes == []

    assert rows(directory)[-1] == 12
    wish = directory.path / "scale.json"
    wish.write_text("{}")
    (directory.checkpoints / ".step-000012.partial").mkdir()
    taken_up.begin()
    taken_up.carry_out()
    assert rows(directory) == list(range(1, 11))
    assert not wish.exists()
    left = [path.name for path in directory.checkpoints.iterdir()]
    assert left == ["step-000005", "step-000010"]


async def test_going_back_costs_nothing_until_training_goes_on(config):
    directory = await run_of(config(), 5, 10, 15)
    before = sorted(directory.path.rglob("*"))
    taken_up = take_up(config("learner.lr=0.1"), INPUTS, "yes", 5)
    assert taken_up.notes == [
        "going back to step 5: once training goes on, step-000010, step-000015 and the rows "
        "of 10 later steps are removed",
        "from step 6: learner.lr 1.0e-06 -> 0.1",
    ]
    taken_up.begin()
    assert sorted(directory.path.rglob("*")) == before
    assert directory.config() == config()
    taken_up.carry_out()
    (checkpoint,) = list_checkpoints(directory.checkpoints)
    assert checkpoint.name == "step-000005"
    assert rows(directory) == [1, 2, 3, 4, 5]
    assert directory.config().learner.lr == 0.1
    assert "--step 7: " in refusal(config(), "yes", 7)


async def test_going_back_behind_a_change_compares_with_what_held_there(config):
    await run_of(config(), 5, 10)
    take_up(config("learner.lr=0.1"), INPUTS, "yes").carry_out()
    again = take_up(config("learner.lr=0.1"), INPUTS, "yes")
    assert texts(again.changes) == ["learner.lr 1.0e-06 -> 0.1"]
    assert again.total_changes == 1
    assert take_up(config(), INPUTS, "yes", 5).changes == []
    directory = again.directory
    await fakes.save_checkpoint(directory.checkpoints, state(15))
    later = take_up(config("learner.lr=0.1", "run.batches=40"), INPUTS, "yes")
    assert texts(later.changes) == ["run.batches 20 -> 40"]
    assert later.total_changes == 2
    later.carry_out()
    back = take_up(config("learner.lr=0.2"), INPUTS, "yes", 10)
    assert texts(back.changes) == ["learner.lr 1.0e-06 -> 0.2"]
    assert back.total_changes == 1
    back.carry_out()
    (row,) = fakes.read_rows(directory.path / "changes.jsonl")
    assert row["from_step"] == 11
    assert row["changes"] == {"learner.lr": [1e-6, 0.2]}


async def test_other_versions_are_changes_that_are_kept(config):
    directory = await run_of(config(), 5)
    file = directory.path / "versions.json"
    versions = json.loads(file.read_text())
    other = {"torch": "1.0.0", "gone": "1", "provenance": {"commit": "0123abc", "cpu_model": "a"}}
    file.write_text(json.dumps(versions | other))
    commit = versions["provenance"].get("commit", "none")
    expected = [f"versions.torch 1.0.0 -> {versions['torch']}"]
    expected += [f"versions.commit 0123abc -> {commit}"] if commit != "none" else []

    back = take_up(config(), INPUTS, "yes")
    assert texts(back.changes) == expected
    assert back.notes == [f"from step 6: {change}" for change in expected]
    back.carry_out()
    (row,) = fakes.read_rows(directory.path / "changes.jsonl")
    assert (row["from_step"], row["changes"]["versions.torch"][0]) == (6, "1.0.0")
    assert texts(take_up(config(), INPUTS, "yes").changes) == expected, "no later step is kept yet"
    add_rows(directory, [6])
    await fakes.save_checkpoint(directory.checkpoints, state(6))
    assert take_up(config(), INPUTS, "yes").changes == []


async def test_versions_are_those_of_the_step_that_a_run_goes_back_to(config):
    directory = await run_of(config(), 5)
    file = directory.path / "versions.json"
    now = file.read_text()
    file.write_text(json.dumps(json.loads(now) | {"torch": "1.0.0"}))
    take_up(config(), INPUTS, "yes").carry_out()
    add_rows(directory, range(6, 11))
    await fakes.save_checkpoint(directory.checkpoints, state(10))
    (change,) = texts(take_up(config(), INPUTS, "yes", 5).changes)
    assert change.startswith("versions.torch 1.0.0 -> ")
    assert take_up(config(), INPUTS, "yes", 10).changes == []


async def test_another_source_of_a_function_is_said_and_refused_by_nobody(
    config, tmp_path, monkeypatch
):
    module = tmp_path / "made_up_keep.py"
    module.write_text("def keep(scored): return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    filtered = config("flow.filter={function: 'made_up_keep:keep'}")
    await run_of(filtered, 5)
    assert take_up(filtered, INPUTS, "yes").notes == []

    module.write_text("def keep(scored): return False\n")
    (note,) = take_up(filtered, INPUTS, "yes").notes

    start = "flow.filter.function: made_up_keep:keep is not what it was: made_up_keep:keep, sha256 "
    assert note.startswith(start) and "; now made_up_keep:keep, sha256 " in note
    sys.modules.pop("made_up_keep")


async def test_a_complete_run_is_nothing_to_do_and_can_be_extended(config):
    directory = await run_of(config(), 10, 20, status="completed")
    done = take_up(config("learner.lr=0.1"), INPUTS, "auto")
    assert done.complete and done.summary.status == "completed"
    assert not take_up(config(), INPUTS, "yes").complete
    for resume in ("yes", "auto"):
        longer = take_up(config("run.batches=30"), INPUTS, resume)
        assert longer.state.step == 20
        assert longer.notes == ["from step 21: run.batches 20 -> 30"]

    progress = Progress.resume(longer.state, longer.summary)
    assert progress.step == 20 and progress.after is None
    shorter = config("run.batches=15")
    below = "run.batches: 15 is below step 20, which the run goes"
    assert refusal(shorter, "yes").startswith(below)
    assert take_up(shorter, INPUTS, "yes", 10).state.step == 10
    # while it was measured after its last step
    directory.write_summary(Progress(step=20).summary("failed"))
    assert not take_up(config(), INPUTS, "auto").complete


async def test_a_precision_that_was_chosen_is_kept_on_another_machine(config, monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)

    def compute_on(*flags):
        monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))

    compute_on("avx512_bf16")
    await run_of(config(), 2)
    compute_on("avx2")
    here = config()
    assert here.student.dtype == "float32"
    student = take_up(here, INPUTS, "yes").config.student
    assert student.dtype == "bfloat16"
    assert "avx512_bf16" in student.dtype_reason
    message = refusal(config("student.dtype=float32"), "yes")
    assert "student.dtype bfloat16 -> float32" in message


def kept_stage(config):
    """The stage that a run goes on with, the reason, and what changes."""
    taken_up = take_up(config, INPUTS, "yes")
    learner = taken_up.config.learner
    return learner.zero_stage, learner.zero_stage_reason, texts(taken_up.changes)


KEPT = "auto: that of the checkpoints"


async def test_a_zero_stage_that_was_chosen_is_kept_by_any_number_of_ranks(config):
    one = ("student.dtype=float32",)
    two = (*one, "learner.ranks=2")
    await run_of(config(*one), 2)
    assert config(*two).learner.zero_stage == 1
    assert kept_stage(config(*two)) == (0, KEPT, [])
    assert kept_stage(config(*one)) == (0, "auto: the fastest on one rank in float32", [])

    await run_of(config(*two, "run.name=gang"), 2)
    alone = config(*one, "run.name=gang")
    assert alone.learner.zero_stage == 0
    assert kept_stage(alone) == (1, KEPT, [])
    message = refusal(config(*one, "run.name=gang", "learner.zero_stage=0"), "yes")
    assert "learner.zero_stage 1 -> 0. That would be another run" in message


async def test_a_stage_that_was_kept_is_kept_again(config):
    directory = await run_of(config("student.dtype=float32"), 2)
    grown = config("student.dtype=float32", "learner.ranks=2")
    take_up(grown, INPUTS, "yes").carry_out()
    resolved = load_config(directory.path / "config.yaml")
    assert (resolved.learner.zero_stage, resolved.learner.zero_stage_reason) == (0, KEPT)
    assert kept_stage(resolved) == kept_stage(grown) == (0, KEPT, [])


async def test_a_run_of_before_auto_goes_on_with_the_number_in_its_config(config):
    directory = await run_of(config("student.dtype=float32", "learner.zero_stage=1"), 2)
    file = directory.path / "config.yaml"
    without_reason = file.read_text().replace("  zero_stage_reason: null\n", "")
    assert without_reason != file.read_text()
    file.write_text(without_reason)
    here = config("student.dtype=float32")
    assert here.learner.zero_stage == 0
    assert kept_stage(here) == (1, KEPT, [])
    assert kept_stage(load_config(file)) == (1, None, [])
    assert kept_stage(config("student.dtype=float32", "learner.zero_stage=2"))[0] == 2


async def test_offloading_that_the_stage_of_the_checkpoints_cannot_do_is_refused(config):
    await run_of(config("student.dtype=float32"), 2)
    zero = "learner.deepspeed.zero_optimization"
    for name, stage in (("offload_optimizer", 1), ("offload_param", 3)):
        message = refusal(config("student.dtype=float32", f"{zero}.{name}.device=cpu"), "yes")
        assert f"learner.zero_stage 0 -> {stage}" in message

    sharded = ("student.dtype=float32", "run.name=sharded")
    await run_of(config(*sharded, "learner.zero_stage=2"), 2)
    offloads = config(*sharded, f"{zero}.offload_optimizer.device=cpu")
    assert offloads.learner.zero_stage == 1
    assert kept_stage(offloads) == (2, KEPT, [])


async def test_a_run_directory_may_be_moved_and_renamed(config, tmp_path):
    directory = await run_of(config(), 10)
    (tmp_path / "moved").mkdir()
    directory.path.rename(tmp_path / "moved" / "new")
    moved = config(f"run.directory={tmp_path}/moved", "run.name=new")
    taken_up = take_up(moved, INPUTS, "yes")
    assert taken_up.changes == [] and taken_up.notes == []
    taken_up.carry_out()
    assert taken_up.directory.config() == moved


async def test_without_a_whole_checkpoint_the_fault_of_each_is_named(config):
    directory = await run_of(config(), 1, 2)
    for checkpoint in directory.checkpoints.iterdir():
        (checkpoint / "state.json").write_text("{}")

    for resume in ("no", "yes", "auto"):
        message = refusal(config(), resume)
        none_whole = f"run.name: {directory.path} holds no checkpoint that is whole"
        advice = f"remove {directory.checkpoints} and start with --resume auto"
        assert message.startswith(f"{none_whole}: step-000001: state.json has 2 bytes")
        assert "step-000002: state.json has 2 bytes instead of" in message
        assert message.endswith(advice)


async def test_a_broken_newest_checkpoint_is_passed_over_with_a_message(config):
    directory = await run_of(config(), 5, 10)
    broken = directory.checkpoints / "step-000010"
    (broken / "learner/weights").write_text("")
    taken_up = take_up(config(), INPUTS, "auto")
    assert taken_up.state.step == 5
    assert taken_up.notes == directory.passed_over()
    assert "step-000010: learner/weights has 0" in taken_up.notes[0]
    assert "step-000010 is not whole" in refusal(config(), "yes", 10)
    taken_up.carry_out()
    assert broken.exists(), "a person may want to mend it"


# --- what may change


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("prompts.data", "prompts.data: a does not hold what it held"),
        ("student.model", "student.model: /s does not hold what it held"),
    ],
)
async def test_other_data_or_another_student_is_refused(config, key, message):
    directory = await run_of(config(), 5)
    found = refusal(config(), "yes", inputs=INPUTS | {key: "other"})
    assert found == (
        f"--resume: {message}. That would be another run. Put it back as it was; or write "
        f"the student of this one with `eopd export {directory.path}`, and start a new run "
        "from it (student.model, and another run.name)"
    )


PARTS = "prompts.data=[{data: a, weight: 3}, {data: c, weight: 1}]"
OF_PARTS = INPUTS | {"prompts.data.0": "6", "prompts.data.1": "7"}


async def test_the_part_that_holds_something_else_is_named(config):
    await run_of(config(PARTS), 5, inputs=OF_PARTS)
    other = OF_PARTS | {"prompts.data": "other", "prompts.data.1": "other"}
    message = refusal(config(PARTS), "yes", inputs=other)
    assert message.startswith("--resume: prompts.data.1: c does not hold what it held. That would ")
    assert take_up(config(PARTS), OF_PARTS, "yes").changes == []


async def test_other_weights_are_another_run(config):
    await run_of(config(PARTS), 5, inputs=OF_PARTS)
    heavier = PARTS.replace("weight: 1", "weight: 2")
    message = refusal(config(heavier), "yes", inputs=OF_PARTS)
    assert message.startswith("--resume: prompts.data.1.weight 1.0 -> 2.0. That would be another ")
    without = "prompts.data=[a, c]"
    message = refusal(config(without), "yes", inputs=OF_PARTS)
    assert "prompts.data.0.weight 3.0 -> null; prompts.data.1.weight 1.0 -> null." in message


async def test_a_further_part_is_another_run(config):
    await run_of(config(), 5)
    message = refusal(
        config("prompts.data=[a, c]"),
        "yes",
        inputs=OF_PARTS | {"prompts.data": "9"},
    )
    assert "prompts.data: a, c does not hold what it held; prompts.data.1 null -> c. " in message


async def test_parts_may_move(config):
    await run_of(config(PARTS), 5, inputs=OF_PARTS)
    moved = config(PARTS.replace("data: c", "data: elsewhere"))
    assert take_up(moved, OF_PARTS, "yes").changes == []


async def test_the_key_that_made_other_prompts_is_named(config):
    await run_of(config(), 5)
    other = INPUTS | {"prompts.data": "other"}
    message = refusal(config("prompts.suffix=Think."), "yes", inputs=other)
    assert "prompts.suffix '' -> Think." in message


@pytest.mark.parametrize(
    "key",
    [
        "prompts.held_out",
        "teachers.teacher.model",
    ],
)
async def test_other_held_out_prompts_and_another_teacher_are_said(config, key):
    await run_of(config(), 5)
    (change,) = take_up(config(), INPUTS | {key: "other"}, "yes").changes
    assert change.key == key
    assert str(change).endswith(" does not hold what it held")


async def test_the_same_data_under_another_path_is_the_same_run(config):
    await run_of(config(), 5)
    moved = config(
        "prompts.data=c",
        "prompts.held_out=d",
        "student.model=/elsewhere",
        "prompts.max_tokens=1000",
    )
    assert take_up(moved, INPUTS, "yes").changes == []


MADE_OTHERWISE = {**INPUTS, "prompts.data": "other", "made_as": "0"}


@pytest.mark.parametrize("inputs", [None, MADE_OTHERWISE])
async def test_a_checkpoint_without_digests_that_can_be_compared_is_accepted(config, inputs):
    await run_of(config(), 5, inputs=inputs)
    assert take_up(config(), INPUTS, "yes").changes == []
    moved = take_up(config("prompts.data=c"), INPUTS, "yes")
    assert moved.notes == ["from step 6: prompts.data a -> c"]


def test_a_state_without_digests_can_be_read(tmp_path):
    known = {
        "step": 1,
        "tokens": 3,
        "trajectories": 2,
        "skipped_steps": 1,
        "wall_s": 1.5,
        "ledger": {},
    }
    (tmp_path / "state.json").write_text(json.dumps(known))
    assert DriverState.read(tmp_path).inputs is None


async def test_all_that_would_make_another_run_is_named_at_once(config):
    await run_of(config(), 5)
    message = refusal(config("run.seed=1", "student.lora={}", "learner.lr=0.1"), "yes")
    named = "--resume: run.seed 0 -> 1; student.lora.rank null -> 16; "
    assert message.startswith(named)
    assert "learner.lr" not in message


# --- the runbook

CURES = {
    "checkpoint.every": "9",
    "cluster.max_restarts": "9",
    "cluster.restart_window_s": "900",
    "evaluation.every": "5",
    "flow.lookahead": "2",
    "flow.max_attempts": "9",
    "telemetry.discovery": "dashboards/targets",
    "checkpoint.keep_best": "{metric: held_out/reverse_kl, mode: min}",
    "cluster.start_timeout_s": "900",
    "evaluation.prompts": "8",
    "flow.max_staleness": "1",
    "guard.on_collapse": "stop",
    "learner.lr": "1.0e-7",
    "learner.max_skipped_steps": "9",
    "learner.timeout_s": "900",
    "learner.token_budget": "3000",
    "loss.alpha_warmup": "{batches: 50, start: 0.1}",
    "loss.gate": "{kind: quantile, top: 0.2}",
    "loss.gate.tau": "0.4",
    "rollout.max_response_tokens": "900",
    "rollout.timeout_s": "900",
    "run.on_stall": "end",
    "run.stall_after_s": "900",
    "run.upload": "s3://bucket/folder",
    "rollout.vllm": "{gpu_memory_utilization: 0.5}",
    "checkpoint.keep_last": "9",
    "teachers[].entropy_bound": "low",
    "teachers[].eos_remap": "{1: 2}",
    "teachers[].replicas": "2",
    "teachers[].timeout_s": "900",
    "telemetry.responses": "{every: 10}",
    "weights.connect_timeout_s": "90",
    "weights.timeout_s": "900",
}
NEEDED = {  # with the cure of a key
    "checkpoint.keep_best": ["evaluation.every=5"],
    "flow.lookahead": ["flow.max_staleness=2"],
}

KNOBS = (ROOT / "tests" / "house" / "knobs.txt").read_text(encoding="utf-8").split()


def is_key(name):
    """Whether a name is a key of the config or a section of it."""
    return any(f"{knob}.".startswith(f"{name}.") for knob in KNOBS)


def keys_of_the_runbook():
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    quoted = {found.split(":")[0] for found in re.findall(r"`([^`\n]+)`", text)}
    return sorted(filter(is_key, quoted))


@pytest.mark.parametrize("key", keys_of_the_runbook())
async def test_every_cure_of_the_runbook_can_be_carried_out(config, key):
    directory = await run_of(config(), 5)
    path = key.replace("[]", ".0")
    cured = config(*NEEDED.get(key, ()), f"{path}={CURES[key]}")
    taken_up = take_up(cured, INPUTS, "yes")
    taken_up.carry_out()
    assert directory.config() == cured != config()


def test_the_runbook_names_keys():
    assert len(keys_of_the_runbook()) > 10


STATE = {
    "step": 10,
    "tokens": 3,
    "trajectories": 2,
    "skipped_steps": 1,
    "wall_s": 1.5,
    "ledger": Ledger(Watermark(80)).state(),
}
MANY_TOKENS = {**STATE, "tokens": "many"}
EMPTY_LEDGER = {**STATE, "ledger": {}}
OLD_LEDGER = {**STATE, "ledger": {**STATE["ledger"], "old": 1}}

ANOTHER_VERSION = "; it was damaged, or written by another version of eopd. "
OLDER = "Go on from an older checkpoint (--resume --step N), or begin another run (run.name)"
NO_RECORD = "Remove changes.jsonl to go on without the record of what was changed"


@pytest.mark.parametrize(
    ("saved", "fault"),
    [
        ("{", "is not what was written"),
        (json.dumps({"step": 10}), "lacks tokens"),
        (json.dumps(MANY_TOKENS), "tokens is not what was written"),
        (json.dumps(EMPTY_LEDGER), "its ledger is not what was written"),
        (json.dumps(OLD_LEDGER), "its ledger is not what was written"),
    ],
)
async def test_a_state_of_another_version_is_named_with_the_way_out(config, saved, fault):
    directory = await run_of(config(), 5, 10)
    file = rewritten(directory.checkpoints / "step-000010", saved)
    assert refusal(config(), "yes") == f"{file}: {fault}{ANOTHER_VERSION}{OLDER}"
    assert take_up(config(), INPUTS, "yes", 5).state.step == 5


async def test_a_state_may_hold_what_this_version_does_not_know(config):
    directory = await run_of(config(), 10)
    rewritten(directory.checkpoints / "step-000010", json.dumps({**STATE, "old": 1}))
    assert take_up(config(), INPUTS, "yes").state == DriverState(**STATE)


def rewritten(checkpoint, state):
    """A checkpoint with another ``state.json``, as another version would have written it."""
    (checkpoint / "state.json").write_text(state)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    return checkpoint / "state.json"


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ("", "is not what was written"),
        ("[]", "is not what was written"),
        ("{}", "lacks status"),
        ('{"status": "failed", "steps": "x"}', "steps is not what was written"),
    ],
)
@pytest.mark.parametrize("resume", ["yes", "auto"])
async def test_a_summary_that_was_damaged_is_named_with_the_way_out(config, saved, what, resume):
    directory = await run_of(config(), 10)
    summary = directory.path / "summary.json"
    summary.write_text(saved)
    way_out = (
        "Put it back from a copy; or write the student of this run with "
        f"`eopd export {directory.path}`, and start a new run from it "
        "(student.model, and another run.name)"
    )
    assert refusal(config(), resume) == f"{summary}: {what}{ANOTHER_VERSION}{way_out}"
    summary.unlink()
    message = refusal(config(), resume)
    assert message.endswith(f"summary.json, which every run with checkpoints has. {way_out}")


async def test_a_summary_of_an_older_version_has_values_for_what_it_lacks(config):
    directory = await run_of(config(), 10)
    older = {"status": "interrupted", "steps": 10, "old": 1, "held_out": {}}
    (directory.path / "summary.json").write_text(json.dumps(older))
    taken_up = take_up(config(), INPUTS, "yes")
    progress = Progress.resume(taken_up.state, taken_up.summary)
    assert progress.step == 10
    assert progress.incarnation == 1
    assert progress.before is None


OLD_CONFIG = {"old": 1, "run": {"name": "r", "batches": 0}}
OLD_CHANGE = {"from_step": 11, "time": 1, "changes": {}, "before": OLD_CONFIG}
SECTIONS = ", ".join(sorted(Config.model_fields))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("not json", f"line 1: is not what was written{ANOTHER_VERSION}"),
        ('{"from_step": 11}', f"line 1: lacks time{ANOTHER_VERSION}"),
        (
            json.dumps(OLD_CHANGE),
            "the config from before step 11 cannot be read: run.batches: must be a whole "
            "number from 1 to 1000000000 (is 0); student: is required; teachers: is "
            "required; prompts: is required; flow: is required; old: unknown key; allowed "
            f"here: {SECTIONS}. ",
        ),
    ],
)
async def test_a_damaged_record_of_changes_is_named_with_the_way_out(config, line, fault):
    directory = await run_of(config(), 10)
    changes = directory.path / "changes.jsonl"
    changes.write_text(f"{line}\n")
    assert refusal(config(), "yes") == f"{changes}: {fault}{NO_RECORD}"
    changes.write_text("\n")
    assert take_up(config(), INPUTS, "yes").total_changes == 0
