"""A run is neither overwritten nor continued as something else, and goes on from a checkpoint
that is whole.
"""

import importlib.metadata
import json
import math
import re
import time
from dataclasses import replace

import fakes
import pytest

import eopd
from eopd.config import ConfigError, load_config
from eopd.preflight.environment import require_environment
from eopd.run.changes import Change
from eopd.run.checkpoint import StorageError, write_checkpoint
from eopd.run.directory import RunDirectory
from eopd.run.lock import held
from eopd.run.progress import Progress
from eopd.run.record import Measurement, Sample, held_out_record
from eopd.runtime.resume import take_up
from eopd.telemetry.sinks import JsonlSink
from eopd.types import Estimate, EvalStats, LearnerStats, PolicyVersion, PublishStats, StepDone

NAMES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
STATS = EvalStats(
    **dict.fromkeys(NAMES, Estimate(mean=1.0, standard_error=0.1)),
    student_entropy_counts=(2, 7),
    teacher_entropy_counts=(9, 0),
    parts={},
    num_trajectories=2,
    num_tokens=9,
)


async def save(directory):
    directory.mkdir()
    (directory / "weights").write_text("w")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{name: r, batches: 2, directory: {tmp_path}/runs}}\nstudent: {{model: s}}\nteachers: [{{model: t}}]\n"
        "prompts: {data: a, held_out: b}\nflow: {batch_prompts: 8}"
    )
    return lambda *overrides: load_config(path, overrides)


def test_a_run_that_is_begun_again_is_another_one_to_trackers(config):
    made = RunDirectory.create(config()).path / "mlflow"
    made.mkdir()
    (made / "run-id").write_text("abc")
    RunDirectory.create(config("learner.lr=1.0e-6"))
    assert not (made / "run-id").exists()


async def test_a_run_that_begins_keeps_nothing_of_one_of_its_name(config):
    sample = {"prompt_id": "p", "prompt": "?", "response": "a"}
    directory = RunDirectory.create(config())
    directory.add_held_out("before", 0, STATS, [sample])
    (directory.path / "samples.jsonl").write_text("of an older version\n")
    directory.write_summary(Progress().summary("running"))
    directory.add_trained(1, {0: fakes.header(crc32=7)})
    directory.broken.mkdir()
    directory.report.write_text("old")
    for file in (directory.metrics, directory.timeline):
        file.write_text('{"step": 1}\n')

    await write_checkpoint(directory.checkpoints, fakes.driver_state(1), save, keep_last=1)
    directory.go_on(config("learner.lr=0.1"), 1, [Change("learner.lr", 1e-6, 0.1, "noted")])
    RunDirectory.create(config())
    assert {path.name for path in directory.path.iterdir()} == {"config.yaml", "versions.json"}


def test_a_directory_of_somebody_else_is_left_alone(config):
    directory = RunDirectory(config().run.path)
    directory.require_no_foreign_files()
    directory.path.mkdir(parents=True)
    directory.require_no_foreign_files()
    (directory.path / "run.lock").write_text("")  # of a process that is about to begin here
    directory.require_no_foreign_files()
    (directory.path / "thesis.tex").write_text("")

    with pytest.raises(
        ConfigError,
        match=r"run.name: .*/runs/r holds thesis.tex and is no run of eopd; name another",
    ):
        directory.require_no_foreign_files()

    (directory.path / "versions.json").write_text('{"eopd": "0.1"}')  # killed as it began
    directory.require_no_foreign_files()


FOREIGN = {
    "config.yaml": "trainer: {max_epochs: 3}\n",
    "checkpoints/epoch=1.ckpt": "weights",
    "metrics.jsonl": '{"loss": 1.0}\n',
    "summary.json": "{}",
    "versions.json": '{"python": "3.11"}',
}


@pytest.mark.parametrize("resume", ["no", "yes", "auto"])
def test_a_run_of_another_program_is_refused_and_keeps_all_its_files(config, resume):
    path = config().run.path
    for name, text in FOREIGN.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)

    holds = "checkpoints, config.yaml, metrics.jsonl, ..."
    message = f"run.name: {path} holds {holds} and is no run of eopd; name another run.name"
    for refuses in (lambda: take_up(config(), {}, resume), lambda: RunDirectory.create(config())):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            refuses()

    with pytest.raises(ConfigError, match=re.escape(message)):  # as `eopd check` has it
        require_environment(config("telemetry.port=null"))

    assert {name: (path / name).read_text() for name in FOREIGN} == FOREIGN
    assert RunDirectory(path).num_steps() == 0


def test_a_run_that_begins_removes_checkpoints_of_its_own_form_alone(config):
    directory = RunDirectory.create(config())
    for name in ("step-000001", ".step-000002.partial", "epoch=1.ckpt"):
        (directory.checkpoints / name).mkdir(parents=True)

    RunDirectory.create(config())
    assert [path.name for path in directory.checkpoints.iterdir()] == ["epoch=1.ckpt"]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"step": "x"}', '{"step": null}', '{"step": NaN}', "[" * 100_000]
)
def test_a_line_that_is_no_row_has_no_step(config, line):
    directory = RunDirectory.create(config())
    directory.metrics.write_text(f'{{"step": 3}}\n{line}\n')
    assert directory.num_steps() == 3
    directory.drop_rows_after(3)
    assert directory.metrics.read_text() == '{"step": 3}\n'
    directory.metrics.write_bytes(b"\xff\xfe")
    assert directory.num_steps() == 0


async def test_a_broken_checkpoint_is_passed_over_with_a_message(config):
    directory = RunDirectory.create(config())
    for step in (9, 10, 11):
        await write_checkpoint(directory.checkpoints, fakes.driver_state(step), save, keep_last=9)

    whole, cut, half = (directory.checkpoints / f"step-{step:06d}" for step in (9, 10, 11))
    (cut / "learner/weights").write_text("")
    (half / "manifest.json").unlink()
    reopened = RunDirectory(config().run.path)
    instead = "; the newest that is whole is step-000009"
    assert reopened.passed_over() == [
        f"passing over {cut}: learner/weights has 0 bytes instead of 1{instead}",
        f"passing over {half}: manifest.json cannot be read (No such file or directory){instead}",
    ]
    assert reopened.checkpoint(None) == whole

    with pytest.raises(
        ConfigError, match=r"--step 10: .*step-000010 is not whole: learner/weights has 0 bytes"
    ):
        reopened.checkpoint(10)

    await write_checkpoint(directory.checkpoints, fakes.driver_state(10), save, keep_last=9)
    assert [message.split(":")[0] for message in reopened.passed_over()] == [f"passing over {half}"]
    await write_checkpoint(directory.checkpoints, fakes.driver_state(12), save, keep_last=9)
    assert reopened.passed_over() == []  # older than the one to continue from: nobody asks


def test_rows_after_the_checkpoint_are_dropped(config):
    directory = RunDirectory.create(config())
    directory.metrics.write_text(
        "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 1'
    )
    directory.timeline.write_text(directory.metrics.read_text())

    for step in (1, 2, 3):
        directory.add_trained(
            step, {2 * step: fakes.header(crc32=7), 2 * step + 1: fakes.header(crc32=8)}
        )

    for step in (0, 2, 3):
        directory.add_held_out("after", step, STATS, [{"prompt": "?\u2028"}])

    assert directory.num_steps() == 3
    held_out = directory.path / "held_out.jsonl"
    kept = held_out.read_text().split("\n")[:2]
    directory.drop_rows_after(2)
    assert held_out.read_text().split("\n") == [*kept, ""]
    assert [json.loads(line)["step"] for line in kept] == [0, 2]

    assert directory.num_steps() == 2
    for path in (directory.metrics, directory.timeline):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]

    assert [json.loads(line) for line in directory.trained.read_text().splitlines()] == [
        {"step": 1, "issues": [2, 3], "crc32": [7, 8]},
        {"step": 2, "issues": [4, 5], "crc32": [7, 8]},
    ]


def test_a_run_that_cannot_say_what_it_trained_ends(config):
    directory = RunDirectory.create(config())
    directory.trained.symlink_to("/dev/full")

    with pytest.raises(
        StorageError,
        match=r"trained.jsonl could not be written: \[Errno 28\] .*continue with --resume",
    ):
        directory.add_trained(1, {0: fakes.header(crc32=7)})


def test_summary_and_samples_come_back_as_written(config):
    directory = RunDirectory.create(config())
    progress = Progress(step=4, tokens=40, before=held_out_record(STATS))
    assert directory.read_summary() is None
    directory.write_summary(progress.summary("running"))
    read = directory.read_summary()
    assert read == replace(progress.summary("running"), wall_s=read.wall_s)
    assert read.held_out.before["reverse_kl"] == Measurement(mean=1.0, standard_error=0.1)
    assert read.held_out.after is None and read.steps == 4 and read.status == "running"
    resumed = Progress.resume(fakes.driver_state(4), read)
    assert resumed.before == read.held_out.before and resumed.wall_s > 1.5

    text = {"prompt": "?\u2028\x85"}  # separators that str.splitlines() cuts at
    before, after = (
        [text | {"prompt_id": name, "response": f"{name}, {phase}"} for name in names]
        for phase, names in (("before", "pq"), ("after", "qr"))
    )
    directory.add_held_out("before", 0, STATS, before)
    assert directory.samples() == []
    directory.add_held_out("after", 4, STATS, after)
    (sample,) = directory.samples()
    assert sample == Sample(prompt="?\u2028\x85", before="q, before", after="q, after")


def test_a_measurement_is_kept_for_people(config):
    directory = RunDirectory.create(config())
    directory.add_held_out("after", 4, STATS, [{"prompt_id": "p", "ids": [7]}])
    assert json.loads((directory.path / "held_out.jsonl").read_text()) == {
        "phase": "after",
        "step": 4,
        "num_trajectories": 2,
        "num_dropped": 0,
        "entropy_bin_nats": 0.2,
        "student_entropy_counts": [2, 7],
        "teacher_entropy_counts": [9, 0],
        "samples": [{"prompt_id": "p", "ids": [7]}],
    }


def test_a_run_names_the_versions_it_was_run_with(config):
    directory = RunDirectory.create(config())
    versions = json.loads((directory.path / "versions.json").read_text())
    assert (
        versions["torch"] == importlib.metadata.version("torch")
        and versions["eopd"] == eopd.__version__
    )
    assert {"python", "ray", "transformers", "deepspeed", "numpy"} < versions.keys()
    assert any(name.startswith("vllm") for name in versions)


def done(step: int, tokens: int) -> StepDone:
    stages = ("step", "generate", "score", "wait", "train", "weights")
    return StepDone(
        trained={step: fakes.header(num_response=tokens)},
        stats=LearnerStats(version=PolicyVersion(0, step), metrics={}, skipped_steps=2),
        published=PublishStats(
            version=PolicyVersion(0, step), transfer_s=0.0, pause_s=0.0, num_bytes=0
        ),
        seconds=dict.fromkeys(stages, 2.0),
        spans={},
        in_flight=0,
        ready=0,
        lost={},
        dropped=0,
    )


def test_progress_counts_this_process_for_rates_and_the_run_for_totals():
    progress = Progress(step=10, tokens=1000, trajectories=10)
    for step, tokens in ((11, 100), (12, 200)):
        progress.count(done(step, tokens))

    summary = progress.summary("completed")
    assert summary.tokens == 1300 and summary.tokens_per_s == 300 / 4
    assert (summary.skipped_steps, progress.trajectories, summary.steps) == (2, 12, 12)
    assert summary.step_seconds["train"] == 2.0


def test_progress_tells_the_steps_that_were_skipped_last():
    progress = Progress(step=10, skipped_steps=1)
    progress.count(done(11, 100))
    assert (progress.newly_skipped, progress.skipped_steps) == (1, 2)
    progress.count(done(12, 100))
    assert progress.newly_skipped == 0


def test_the_timeline_keeps_the_spans_of_a_step(config):
    directory = RunDirectory.create(config())
    directory.add_timeline(3, {"generate": [(0.0, 1.23456)], "score": []})
    assert json.loads(directory.timeline.read_text()) == {
        "step": 3,
        "generate": [[0.0, 1.2346]],
        "score": [],
    }


def test_the_last_rows_are_those_of_the_newest_steps_without_what_was_no_number(config):
    directory = RunDirectory.create(config())
    assert directory.last_rows(3) == []
    sink = JsonlSink(directory.metrics)
    for step in range(1, 5):
        sink.write({"eopd_step": float(step), "eopd_loss": math.nan if step == 4 else 0.5})

    rows = directory.last_rows(2)
    assert [(row["step"], row.get("eopd_loss")) for row in rows] == [(3, 0.5), (4, None)]
    assert abs(rows[-1]["time"] - time.time()) < 60 and "eopd_loss" not in rows[-1]


def test_the_status_is_held_against_whoever_runs_the_run(config):
    with (
        held(config().run.path),
        pytest.raises(ConfigError, match=r"is being started by process \d+ on .*; look again"),
    ):
        RunDirectory(config().run.path).status()

    directory = RunDirectory.create(config())
    assert directory.status() == "dead (the process that ran it, is gone)"

    with held(directory.path):
        assert directory.status() == "starting"
        directory.write_summary(Progress().summary("running"))
        assert directory.status() == "running"
        directory.write_summary(Progress().summary("interrupted"))
        assert re.fullmatch(
            r"interrupted \(and being taken up, or left, by process \d+ on .*\)", directory.status()
        )

    assert directory.status() == "interrupted"
    (directory.path / "run.lock").write_text('{"host": "h", "pid": 7, "since": 0}')
    directory.write_summary(Progress().summary("running"))
    assert re.fullmatch(r"dead \(process 7 on h, since 19.*, is gone\)", directory.status())

    with pytest.raises(
        ConfigError, match=r"is dead \(process 7 on h.*only a run that is running can be scaled"
    ):
        directory.ask_for_engines(2)


async def test_what_continues_a_run_depends_on_whether_it_has_a_checkpoint(config):
    directory = RunDirectory.create(config())
    assert directory.resume_options() == ["--resume", "auto"]
    await write_checkpoint(directory.checkpoints, fakes.driver_state(1), save, keep_last=1)
    assert directory.resume_options() == ["--resume"]


def test_a_run_remembers_which_config_held_when(config):
    directory = RunDirectory.create(config())
    lr = Change("learner.lr", 1e-6, 0.1, "noted")
    directory.go_on(config("learner.lr=0.1"), 10, [lr])
    directory.go_on(
        config("learner.lr=0.1", "run.batches=40"), 20, [Change("run.batches", 2, 40, "noted")]
    )
    assert [directory.config_at(step).learner.lr for step in (9, 10, 11, 20, 21)] == [
        1e-6,
        1e-6,
        0.1,
        0.1,
        0.1,
    ]
    assert [directory.config_at(step).run.batches for step in (10, 20, 21)] == [2, 2, 40]
    assert [directory.num_changes(step) for step in (10, 11, 20, 21)] == [0, 1, 1, 2]
    rows = [
        json.loads(line) for line in (directory.path / "changes.jsonl").read_text().splitlines()
    ]
    assert [(row["from_step"], row["changes"]) for row in rows] == [
        (11, {"learner.lr": [1e-6, 0.1]}),
        (21, {"run.batches": [2, 40]}),
    ]
    directory.go_on(config("learner.lr=0.2"), 10, [Change("learner.lr", 1e-6, 0.2, "noted")])
    assert directory.config_at(10) == config() and directory.config() == config("learner.lr=0.2")
    assert (directory.num_changes(10), directory.num_changes(99)) == (0, 1)
    directory.go_on(config(), 10, [])
    assert (
        directory.config() == directory.config_at(10) == config() and directory.num_changes(99) == 0
    )


def test_a_row_that_was_cut_short_is_left_out(config):
    directory = RunDirectory.create(config())
    rows = [{"step": step, "time": float(step), "eopd_step": step} for step in (1, 2)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for line in ('{"step": 3, "ti', "[1]\n", '{"loss": 1.0}\n', "[" * 100_000):
        directory.metrics.write_text(whole + line)
        assert directory.last_rows(9) == rows

    sample = {"prompt_id": "p", "prompt": "?", "response": "a\u2028b"}
    for phase in ("before", "after"):
        directory.add_held_out(phase, 0, STATS, [sample])

    with (directory.path / "held_out.jsonl").open("a") as file:
        file.write('{"phase": "af')

    assert directory.samples() == [Sample(prompt="?", before="a\u2028b", after="a\u2028b")]
