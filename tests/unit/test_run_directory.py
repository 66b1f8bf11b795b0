"""A run is neither overwritten nor continued as something else, and goes on from a checkpoint
that is whole.
"""

import importlib.metadata
import json
import math
import re
import subprocess
import time
import tracemalloc
from dataclasses import replace

import fakes
import pytest

import eopd
from eopd.config import ConfigError, load_config
from eopd.preflight.environment import require_environment
from eopd.run.changes import Change
from eopd.run.directory import RunDirectory
from eopd.run.lock import held
from eopd.run.place import require_no_foreign_files
from eopd.run.progress import Progress
from eopd.run.provenance import provenance
from eopd.run.record import Measurement, Sample, append_jsonl
from eopd.run.storage import StorageError
from eopd.run.upload import Uploads
from eopd.runtime.resume import take_up
from eopd.runtime.state import RunState
from eopd.telemetry.sinks import append_row
from eopd.types import EvalStats, LearnerStats, PolicyVersion, PublishStats, StepDone

STATS = EvalStats(
    by_prompt={"tokens": {"p": 4.0, "q": 5.0}},
    student_entropy_counts=(2, 7),
    teacher_entropy_counts=(9, 0),
)
MEASURED = {"reverse_kl": Measurement(mean=1.0, standard_error=0.1)}


@pytest.fixture
def config(tmp_path):
    path = fakes.write_config(tmp_path)
    return lambda *overrides: load_config(path, overrides)


def noted(key, before, after):
    return Change(key, before, after, "noted")


def test_a_run_that_is_begun_again_is_another_one_to_trackers(config):
    made = RunDirectory.create(config()).path / "mlflow"
    made.mkdir()
    (made / "run-id").write_text("abc")
    RunDirectory.create(config("learner.lr=1.0e-6"))
    assert not (made / "run-id").exists()


async def test_a_run_that_begins_keeps_nothing_of_one_of_its_name(config):
    sample = {"prompt_id": "p", "prompt": "?", "response": "a"}
    run = RunDirectory.create(config())
    run.add_held_out("before", 0, STATS, [sample])
    run.write_summary(Progress().summary("running"))
    run.add_trained(1, {0: fakes.header(crc32=7)})
    run.broken.mkdir()
    run.report.write_text("old")
    for file in (run.metrics, run.timeline):
        file.write_text('{"step": 1}\n')

    await fakes.save_checkpoint(run.checkpoints, fakes.driver_state(1))
    run.go_on(config("learner.lr=0.1"), 1, [noted("learner.lr", 1e-6, 0.1)])
    RunDirectory.create(config())
    kept = {path.name for path in run.path.iterdir()}
    assert kept == {"config.yaml", "versions.json"}


def test_a_directory_of_somebody_else_is_left_alone(config):
    run = RunDirectory(config().run.path)
    require_no_foreign_files(run.path)
    run.path.mkdir(parents=True)
    require_no_foreign_files(run.path)
    (run.path / "run.lock").write_text("")  # of a process that is about to begin here
    (run.path / "stop.json").write_text("{}")  # and is asked to end already
    (run.path / ".versions.json.partial").write_text("")  # or was killed in its first file
    require_no_foreign_files(run.path)
    (run.path / "run.locksmith").write_text("")
    with pytest.raises(ConfigError, match=r"holds run.locksmith and is no run"):
        require_no_foreign_files(run.path)

    (run.path / "run.locksmith").unlink()
    (run.path / "thesis.tex").write_text("")

    holds = r"run.name: .*/runs/r holds thesis.tex and is no run of eopd; name another"
    with pytest.raises(ConfigError, match=holds):
        require_no_foreign_files(run.path)

    (run.path / "versions.json").write_text('{"eopd": "0.1"}')  # killed as it began
    require_no_foreign_files(run.path)


FOREIGN = {
    "config.yaml": "trainer: {max_epochs: 3}\n",
    "checkpoints/epoch=1.ckpt": "weights",
    "metrics.jsonl": '{"loss": 1.0}\n',
    "summary.json": "{}",
    "versions.json": '{"python": "3.11"}',
}


@pytest.mark.parametrize("resume", ["no", "yes", "auto"])
def test_a_run_of_another_program_is_refused_and_kept(config, resume):
    path = config().run.path
    for name, text in FOREIGN.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)

    holds = "checkpoints, config.yaml, metrics.jsonl, ..."
    message = re.escape(
        f"run.name: {path} holds {holds} and is no run of eopd; name another run.name"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        take_up(config(), {}, resume)

    with pytest.raises(ConfigError, match=f"^{message}$"):
        RunDirectory.create(config())

    with pytest.raises(ConfigError, match=message):  # as `eopd check` has it
        require_environment(config("telemetry.port=null"))

    kept = {name: (path / name).read_text() for name in FOREIGN}
    assert kept == FOREIGN
    assert RunDirectory(path).num_steps() == 0


def test_a_run_that_begins_removes_its_own_checkpoints_alone(config):
    run = RunDirectory.create(config())
    for name in ("step-000001", ".step-000002.partial", "epoch=1.ckpt"):
        (run.checkpoints / name).mkdir(parents=True)

    RunDirectory.create(config())
    left = [path.name for path in run.checkpoints.iterdir()]
    assert left == ["epoch=1.ckpt"]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"step": "x"}',
        '{"step": null}',
        '{"step": NaN}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_row_has_no_step(config, line):
    run = RunDirectory.create(config())
    run.metrics.write_text(f'{{"step": 3}}\n{line}\n')
    assert run.num_steps() == 3
    run.drop_rows_after(3)
    assert run.metrics.read_text() == '{"step": 3}\n'
    run.metrics.write_bytes(b"\xff\xfe")
    assert run.num_steps() == 0


def test_rows_are_dropped_line_by_line_and_a_file_that_needs_none_is_left(config):
    """A benchmark ends beside a later step, so that its row comes late. Files may be larger than the
    memory of the driver.
    """
    run = RunDirectory.create(config())
    late = [*range(1, 40), 38, 41, 40]
    run.evaluations.write_text(text_of({"step": step} for step in late))
    with run.metrics.open("w") as file:
        file.writelines(text_of([{"step": step, "text": "é😀" * 500}]) for step in range(5_000))

    unchanged = run.metrics.stat().st_mtime_ns
    run.drop_rows_after(4_999)
    assert run.metrics.stat().st_mtime_ns == unchanged
    tracemalloc.start()
    run.drop_rows_after(40)
    assert tracemalloc.get_traced_memory()[1] < 12 << 20  # of 45 MB
    tracemalloc.stop()
    assert [row["step"] for row in fakes.read_rows(run.metrics)] == list(range(41))
    assert [row["step"] for row in fakes.read_rows(run.evaluations)] == [*range(1, 40), 38, 40]


async def test_a_broken_checkpoint_is_passed_over_with_a_message(config):
    run = RunDirectory.create(config())
    for step in (9, 10, 11):
        await fakes.save_checkpoint(run.checkpoints, fakes.driver_state(step))

    whole, cut, half = (run.checkpoints / f"step-{step:06d}" for step in (9, 10, 11))
    (cut / "learner/weights").write_text("")
    (half / "manifest.json").unlink()
    reopened = RunDirectory(config().run.path)
    empty = "learner/weights has 0 bytes"
    missing = "manifest.json cannot be read (No such file or directory)"
    instead = "the newest that is whole is step-000009"
    assert reopened.passed_over() == [
        f"passing over {cut}: {empty} instead of 1; {instead}",
        f"passing over {half}: {missing}; {instead}",
    ]
    assert reopened.checkpoint(None) == whole

    not_whole = rf"--step 10: .*step-000010 is not whole: {empty}"
    with pytest.raises(ConfigError, match=not_whole):
        reopened.checkpoint(10)

    await fakes.save_checkpoint(run.checkpoints, fakes.driver_state(10))
    (message,) = reopened.passed_over()
    assert message.split(":")[0] == f"passing over {half}"
    await fakes.save_checkpoint(run.checkpoints, fakes.driver_state(12))
    assert reopened.passed_over() == []  # older than the one to continue from: nobody asks


def test_rows_after_the_checkpoint_are_dropped(config):
    run = RunDirectory.create(config())
    rows = [{"step": 1}, {"step": 2}, {"step": 3}]
    cut_short = '{"step": 1'
    run.metrics.write_text(text_of(rows) + cut_short)
    run.timeline.write_text(run.metrics.read_text())

    for step in (1, 2, 3):
        first, second = 2 * step, 2 * step + 1
        trained = {first: fakes.header(crc32=7), second: fakes.header(crc32=8)}
        run.add_trained(step, trained)

    for step in (0, 2, 3):
        run.add_held_out("after", step, STATS, [{"prompt": "?\u2028"}])

    held_out = run.path / "held_out.jsonl"
    kept = held_out.read_text().split("\n")[:2]
    assert run.num_steps() == 3
    run.drop_rows_after(2)
    assert held_out.read_text().split("\n") == [*kept, ""]
    assert [json.loads(line)["step"] for line in kept] == [0, 2]
    assert run.num_steps() == 2
    for path in (run.metrics, run.timeline):
        assert [row["step"] for row in fakes.read_rows(path)] == [1, 2]

    assert fakes.read_rows(run.trained) == [
        {"step": 1, "issues": [2, 3], "crc32": [7, 8]},
        {"step": 2, "issues": [4, 5], "crc32": [7, 8]},
    ]


def text_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_run_that_cannot_say_what_it_trained_ends(config):
    run = RunDirectory.create(config())
    run.trained.symlink_to("/dev/full")

    full = r"trained.jsonl could not be written: \[Errno 28\] .*continue with --resume"
    with pytest.raises(StorageError, match=full):
        run.add_trained(1, {0: fakes.header(crc32=7)})


def test_summary_and_samples_come_back_as_written(config):
    run = RunDirectory.create(config())
    progress = Progress(step=4, tokens=40, before=MEASURED)
    assert run.read_summary() is None
    run.write_summary(progress.summary("running"))
    summary = run.read_summary()
    assert summary == replace(progress.summary("running"), wall_s=summary.wall_s)
    assert summary.held_out.before["reverse_kl"] == Measurement(mean=1.0, standard_error=0.1)
    assert summary.held_out.after is None
    assert summary.steps == 4
    assert summary.status == "running"
    resumed = Progress.resume(fakes.driver_state(4), summary)
    assert resumed.before == summary.held_out.before
    assert resumed.wall_s > 1.5

    def samples(phase, names):
        prompt = "?\u2028\x85"  # separators that str.splitlines() cuts at
        return [
            {"prompt": prompt, "prompt_id": name, "response": f"{name}, {phase}"} for name in names
        ]

    run.add_held_out("before", 0, STATS, samples("before", "pq"))
    assert run.samples() == []
    run.add_held_out("after", 4, STATS, samples("after", "qr"))
    (sample,) = run.samples()
    assert sample == Sample(prompt="?\u2028\x85", before="q, before", after="q, after")


def test_a_measurement_is_kept_for_people(config):
    run = RunDirectory.create(config())
    run.add_held_out("after", 4, STATS, [{"prompt_id": "p", "ids": [7]}])
    assert json.loads((run.path / "held_out.jsonl").read_text()) == {
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
    run = RunDirectory.create(config())
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["eopd"] == eopd.__version__
    assert {"python", "ray", "transformers", "deepspeed", "numpy"} < versions.keys()
    assert any(name.startswith("vllm") for name in versions)


def test_a_run_names_its_commit_and_its_machines_where_it_ran_last(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no repository
    run = RunDirectory.create(config(), {"nodes": 2})
    read = run.path / "versions.json"
    assert {"commit", "nodes"} & json.loads(read.read_text())["provenance"].keys() == {"nodes"}
    in_repository(tmp_path)
    run.go_on(config(), 1, [], {"nodes": 3})
    kept = json.loads(read.read_text())["provenance"]
    assert re.fullmatch("[0-9a-f]{12}", kept["commit"]) and kept["nodes"] == 3


def test_a_config_of_another_version_is_told_as_one(config):
    run = RunDirectory.create(config())
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("run:\n", "run:\n  future: 1\n", 1))
    with pytest.raises(ConfigError) as caught:
        run.config()

    assert "run.future: unknown key" in str(caught.value)
    assert str(caught.value).endswith(
        "; it was changed by hand, or written by another version of eopd"
    )


def test_a_commit_with_changes_says_so(tmp_path):
    in_repository(tmp_path)
    clean = provenance(tmp_path)["commit"]
    (tmp_path / "file").write_text("changed")
    assert provenance(tmp_path)["commit"] == f"{clean}-dirty"


def test_a_copy_of_a_repository_has_the_commit_that_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.setenv("EOPD_COMMIT", "0123abc-dirty")
    assert provenance(tmp_path)["commit"] == "0123abc-dirty"
    in_repository(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", provenance(tmp_path)["commit"])


def in_repository(path):
    (path / "file").write_text("")
    who = ("-c", "user.name=n", "-c", "user.email=e")
    for command in (("init",), ("add", "file"), (*who, "commit", "-m", "m")):
        subprocess.run(["git", *command], cwd=path, check=True, capture_output=True)


def done(step: int, tokens: int) -> StepDone:
    version = PolicyVersion(0, step)
    stages = ("step", "generate", "score", "wait", "train", "weights")
    return StepDone(
        trained={step: fakes.header(num_response=tokens)},
        stats=LearnerStats(version=version, metrics={}, skipped_steps=2),
        published=PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0),
        seconds=dict.fromkeys(stages, 2.0),
        spans={},
        in_flight=0,
        ready=0,
    )


def test_rates_are_of_the_steps_whose_times_are_known():
    progress = Progress(step=10, tokens=1000, trajectories=10)
    for step, tokens in ((11, 100), (12, 200)):
        progress.count(done(step, tokens))

    summary = progress.summary("completed")
    assert summary.tokens == 1300
    assert summary.tokens_per_s == 300 / 4
    assert summary.skipped_steps == 2
    assert progress.trajectories == summary.steps == 12
    assert summary.step_seconds["train"] == 2.0


def test_progress_tells_the_steps_that_were_skipped_last():
    progress = Progress(step=10, skipped_steps=1)
    progress.count(done(11, 100))
    assert progress.newly_skipped == 1
    assert progress.skipped_steps == 2
    progress.count(done(12, 100))
    assert progress.newly_skipped == 0


def test_the_timeline_keeps_the_spans_of_a_step(config):
    run = RunDirectory.create(config())
    run.add_timeline(3, 1, {"generate": [(0.0, 1.23456)], "score": []})
    assert json.loads(run.timeline.read_text()) == {
        "step": 3,
        "incarnation": 1,
        "generate": [[0.0, 1.2346]],
        "score": [],
    }


def test_a_step_is_kept_with_the_incarnation_that_made_it(config):
    taken_up = take_up(config(), {})
    taken_up.begin()
    state = RunState(taken_up, Uploads(taken_up.config, print))
    for incarnation in (0, 1):
        state.progress.incarnation = incarnation
        state.progress.count(done(incarnation + 1, 10))
        state.keep(done(incarnation + 1, 10))

    kept = [json.loads(line) for line in state.directory.timeline.read_text().splitlines()]
    assert kept == [{"step": 1, "incarnation": 0}, {"step": 2, "incarnation": 1}]


def test_the_last_rows_leave_out_what_was_no_number(config):
    run = RunDirectory.create(config())
    assert run.last_rows(3) == []
    for step, loss in enumerate((0.5, 0.5, 0.5, math.nan), start=1):
        append_row(run.metrics, {"eopd_step": float(step), "eopd_loss": loss})

    third, fourth = run.last_rows(2)
    assert (third["step"], third["eopd_loss"]) == (3, 0.5)
    assert fourth["step"] == 4
    assert "eopd_loss" not in fourth
    assert abs(fourth["time"] - time.time()) < 60


@pytest.mark.parametrize("end", ['{"eopd_st', "garbage\n", "\0\0\0", '{"step": 5}\n'])
def test_a_damaged_end_leaves_the_last_whole_rows(config, end):
    run = RunDirectory.create(config())
    for step in (1.0, 2.0, 3.0):
        append_row(run.metrics, {"eopd_step": step})

    with run.metrics.open("a") as file:
        file.write(end)

    assert [row["eopd_step"] for row in run.last_rows(1)] == [3.0]
    assert [row["eopd_step"] for row in run.last_rows(2)] == [2.0, 3.0]


def test_the_status_is_held_against_whoever_runs_the_run(config):
    path = config().run.path
    started = r"is being started by process \d+ on .*; look again"
    with held(path), pytest.raises(ConfigError, match=started):
        RunDirectory(path).status()

    run = RunDirectory.create(config())
    assert run.status() == "dead (the process that ran it is gone)"

    with held(run.path):
        assert run.status() == "starting"
        run.write_summary(Progress().summary("running"))
        assert run.status() == "running"
        run.write_summary(Progress().summary("interrupted"))
        taken_up = r"interrupted \(and being taken up, or left, by process \d+ on .*\)"
        assert re.fullmatch(taken_up, run.status())

    assert run.status() == "interrupted"
    (run.path / "run.lock").write_text('{"host": "h", "pid": 7, "since": 0}')
    run.write_summary(Progress().summary("running"))
    gone = r"dead \(process 7 on h, since 19.*, is gone\)"
    assert re.fullmatch(gone, run.status())

    not_running = r"is dead \(process 7 on h.*only a run that is running can be scaled"
    with pytest.raises(ConfigError, match=not_running):
        run.ask_for_engines(2)


async def test_what_continues_a_run_depends_on_its_checkpoints(config):
    run = RunDirectory.create(config())
    assert run.resume_options() == ["--resume", "auto"]
    await fakes.save_checkpoint(run.checkpoints, fakes.driver_state(1))
    assert run.resume_options() == ["--resume"]


def test_a_run_remembers_which_config_held_when(config):
    run = RunDirectory.create(config())
    at_first = config()
    faster = config("learner.lr=0.1")
    longer = config("learner.lr=0.1", "run.batches=40")
    run.go_on(faster, 10, [noted("learner.lr", 1e-6, 0.1)])
    run.go_on(longer, 20, [noted("run.batches", 2, 40)])
    rates = [run.config_at(step).learner.lr for step in (9, 10, 11, 20, 21)]
    assert rates == [1e-6, 1e-6, 0.1, 0.1, 0.1]
    batches = [run.config_at(step).run.batches for step in (10, 20, 21)]
    assert batches == [2, 2, 40]
    assert [run.num_changes(step) for step in (10, 11, 20, 21)] == [0, 1, 1, 2]
    rows = fakes.read_rows(run.path / "changes.jsonl")
    assert [(row["from_step"], row["changes"]) for row in rows] == [
        (11, {"learner.lr": [1e-6, 0.1]}),
        (21, {"run.batches": [2, 40]}),
    ]
    fastest = config("learner.lr=0.2")
    run.go_on(fastest, 10, [noted("learner.lr", 1e-6, 0.2)])
    assert run.config_at(10) == at_first
    assert run.config() == fastest
    assert run.num_changes(10) == 0
    assert run.num_changes(99) == 1
    run.go_on(at_first, 10, [])
    assert run.config() == run.config_at(10) == at_first
    assert run.num_changes(99) == 0


def test_a_row_that_was_cut_short_is_left_out(config):
    run = RunDirectory.create(config())
    rows = [
        {"step": 1, "time": 1.0, "eopd_step": 1},
        {"step": 2, "time": 2.0, "eopd_step": 2},
    ]
    for line in ('{"step": 3, "ti', "[1]\n", '{"loss": 1.0}\n', "[" * 100_000):
        run.metrics.write_text(text_of(rows) + line)
        assert run.last_rows(9) == rows

    sample = {"prompt_id": "p", "prompt": "?", "response": "a\u2028b"}
    for phase in ("before", "after"):
        run.add_held_out(phase, 0, STATS, [sample])

    with (run.path / "held_out.jsonl").open("a") as file:
        file.write('{"phase": "af')

    both = {"before": "a\u2028b", "after": "a\u2028b"}
    assert run.samples() == [Sample(prompt="?", **both)]


def test_half_a_line_that_a_lost_machine_left_costs_no_other_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "ti')

    append_jsonl(path, {"step": 3})
    append_jsonl(path, {"step": 4})
    lines = path.read_text().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2, "ti', '{"step": 3}', '{"step": 4}']


def test_samples_that_are_damaged_are_left_out(config):
    run = RunDirectory.create(config())
    whole = {"prompt_id": "p", "prompt": "?", "response": "a"}
    damaged = [{"prompt_id": "q", "prompt": "?"}, {"response": ["b"]}, "text", None]
    for phase in ("before", "after"):
        run.add_held_out(phase, 0, STATS, [*damaged, whole])

    with (run.path / "held_out.jsonl").open("a") as file:
        file.write('{"phase": ["after"], "samples": 3}\n')

    assert run.samples() == [Sample(prompt="?", before="a", after="a")]
    with (run.path / "held_out.jsonl").open("a") as file:
        file.write('{"phase": "after", "samples": 3}\n')

    assert run.samples() == []
