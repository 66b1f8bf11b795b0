"""A run is neither overwritten nor continued as something else, and goes on from a checkpoint that is whole."""

import importlib.metadata
import json
import math
import time

import pytest

import eopd
from eopd.checkpoint import DriverState, StorageError, write_checkpoint
from eopd.config import Config, ConfigError, load_config
from eopd.ledger import Ledger
from eopd.runtime.progress import Progress
from eopd.runtime.run_directory import MAY_CHANGE, RunDirectory, held_out_record
from eopd.telemetry.sinks import JsonlSink
from eopd.types import Estimate, EvalStats, Header, StopReason, TrajectoryKey

NAMES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
STATS = EvalStats(
    **dict.fromkeys(NAMES, Estimate(mean=1.0, standard_error=0.1)),
    student_entropy_counts=(2, 7),
    teacher_entropy_counts=(9, 0),
    num_trajectories=2,
    num_tokens=9,
)


def state(step: int) -> DriverState:
    return DriverState(
        step=step, tokens=3, trajectories=2, skipped_steps=1, wall_s=1.5, ledger=Ledger(floor=step).state()
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


async def test_a_run_is_not_overwritten_and_resumes_only_as_itself(config):
    sample = {"prompt_id": "p", "prompt": "?", "response": "a"}
    first = RunDirectory.create(config())
    first.add_samples("before", 0, [sample])
    first.add_held_out("before", 0, STATS, [sample])
    directory = RunDirectory.create(config("learner.lr=1.0e-6"))  # no step yet: begun again
    assert {path.name for path in directory.path.iterdir()} == {"config.yaml", "versions.json"}
    directory.metrics.write_text("")
    with pytest.raises(ConfigError, match=r"run.name: .* exists; continue it with --resume"):
        RunDirectory.create(config())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        RunDirectory.reopen(config())
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    refusal = rf"learner.lr was 1e-06 and is 0.1; only {', '.join(MAY_CHANGE)} may change"
    with pytest.raises(ConfigError, match=refusal):
        RunDirectory.reopen(config("learner.lr=0.1"))
    assert RunDirectory.reopen(config("checkpoint.every=7")).path == directory.path
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.reopen(config("run.name=other"))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            "learner.ranks=2; learner.cpus=0.5; learner.gpus=1; learner.threads=3; learner.timeout_s=9; "
            "rollout.timeout_s=9; rollout.engines=3; run.stall_after_s=9; run.on_stall=end",
            None,
        ),
        ("checkpoint.keep_last=1; telemetry.port=null; cluster.cpus=3", None),
        ("run.batches=3", "run.batches was 2 and is 3"),
        ("run.seed=1", "run.seed was 0 and is 1"),
        ("student.dtype=float32", "student.dtype was 'bfloat16' and is 'float32'"),
        ("student.lora={rank: 4}", "student.lora.alpha was None and is 32.0"),
        ("teachers.0.temperature=2", "teachers.0.temperature was 1.0 and is 2.0"),
        (
            "teachers=[{model: t, name: a, sources: [x]}, {model: t, name: b}]",
            "teachers.0.name was 'teacher' and is 'a'",
        ),
        ("prompts.held_out=c", "prompts.held_out was 'b' and is 'c'"),
        ("rollout.cpus=2", "rollout.cpus was 1.0 and is 2.0"),
        ("rollout.vllm={seed: 3}", "rollout.vllm.seed was None and is 3"),
        ("flow.max_staleness=1", "flow.max_staleness was 0 and is 1"),
        ("loss.top_k=7", "loss.top_k was 16 and is 7"),
        ("learner.zero_stage=2", "learner.zero_stage was 1 and is 2"),
        ("learner.token_budget=9000", "learner.token_budget was 8192 and is 9000"),
        ("learner.deepspeed.ranks=2", "learner.deepspeed.ranks was None and is 2"),
        ("weights.timeout_s=9; weights.connect_timeout_s=9; weights.verify_every=0", None),
        ("weights.bucket_bytes=9000", "weights.bucket_bytes was 67108864 and is 9000"),
        ("evaluation.seed=9", "evaluation.seed was 1234 and is 9"),
    ],
)
async def test_a_resumed_run_may_change_its_place_and_nothing_else(config, changes, refused):
    directory = RunDirectory.create(config())
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    changed = config(*changes.split("; "))
    if refused is None:
        RunDirectory.reopen(changed)
        assert load_config(directory.path / "config.yaml") == changed
    else:
        with pytest.raises(ConfigError) as caught:
            RunDirectory.reopen(changed)
        message = str(caught.value)
        listed = "checkpoint, telemetry, cluster, learner.ranks, learner.cpus, learner.gpus, learner.threads"
        listed += ", learner.timeout_s, rollout.engines, rollout.timeout_s, run.stall_after_s, run.on_stall"
        listed += ", weights.connect_timeout_s, weights.timeout_s, weights.verify_every"
        assert message.startswith(f"--resume: {refused}") and message.endswith(f"; only {listed} may change")
        assert load_config(directory.path / "config.yaml") == config()


async def test_round_robin_gradients_fix_the_number_of_ranks(config):
    native = "learner.deepspeed={zero_optimization: {round_robin_gradients: true}}"
    directory = RunDirectory.create(config(native))
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    RunDirectory.reopen(config(native, "learner.threads=2"))
    with pytest.raises(ConfigError, match=r"learner.ranks was 1 and is 2; only .*cluster, learner.cpus, .* may change"):
        RunDirectory.reopen(config(native, "learner.ranks=2"))


def test_every_section_of_the_config_is_either_fixed_or_listed():
    """A new section must be put on one side or the other, and tested above."""
    tested = {"run", "student", "teachers", "prompts", "rollout", "flow", "loss", "weights", "evaluation", "learner"}
    assert tested | {"checkpoint", "telemetry", "cluster"} == set(Config.model_fields)


async def test_a_broken_checkpoint_is_passed_over_with_a_message(config):
    directory = RunDirectory.create(config())
    for step in (9, 10, 11):
        await write_checkpoint(directory.checkpoints, state(step), save, keep_last=9)
    whole, cut, half = (directory.checkpoints / f"step-{step:06d}" for step in (9, 10, 11))
    (cut / "learner/weights").write_text("")
    (half / "manifest.json").unlink()
    (directory.checkpoints / ".step-000012.partial").mkdir()
    reopened = RunDirectory.reopen(config())
    instead = "; the newest that is whole is step-000009"
    assert reopened.passed_over() == [
        f"passing over {cut}: learner/weights has 0 bytes instead of 1{instead}",
        f"passing over {half}: manifest.json cannot be read (No such file or directory){instead}",
    ]
    assert reopened.checkpoint(None) == whole
    assert not (directory.checkpoints / ".step-000012.partial").exists()
    with pytest.raises(ConfigError, match=r"--step 10: .*step-000010 is not whole: learner/weights has 0 bytes"):
        reopened.checkpoint(10)
    await write_checkpoint(directory.checkpoints, state(10), save, keep_last=9)
    assert [message.split(":")[0] for message in reopened.passed_over()] == [f"passing over {half}"]
    await write_checkpoint(directory.checkpoints, state(12), save, keep_last=9)
    assert reopened.passed_over() == []  # older than the one to continue from: nobody asks


async def test_without_a_whole_checkpoint_the_fault_of_each_is_named(config):
    directory = RunDirectory.create(config())
    for step in (1, 2):
        await write_checkpoint(directory.checkpoints, state(step), save, keep_last=2)
    for checkpoint in directory.checkpoints.iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        RunDirectory.reopen(config())
    message = str(caught.value)
    assert message.startswith(
        f"--resume: {directory.path} holds no checkpoint that is whole: step-000001: state.json has"
    )
    assert "step-000002: state.json has 2 bytes instead of" in message
    assert message.endswith("start it under another run.name")


def header(response_crc32: int) -> Header:
    return Header(
        key=TrajectoryKey(0, "p", 0),
        source="s",
        num_prompt_tokens=1,
        num_response_tokens=1,
        num_loss_tokens=1,
        stop_reason=StopReason.LENGTH,
        oldest_version=0,
        newest_version=0,
        response_crc32=response_crc32,
        sums={},
    )


def test_rows_after_the_checkpoint_are_dropped(config):
    directory = RunDirectory.create(config())
    directory.metrics.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 1')
    directory.timeline.write_text(directory.metrics.read_text())
    for step in (1, 2, 3):
        directory.add_trained(step, {2 * step: header(7), 2 * step + 1: header(8)})
    directory.drop_rows_after(2)
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
        StorageError, match=r"trained.jsonl could not be written: \[Errno 28\] .*continue with --resume"
    ):
        directory.add_trained(1, {0: header(7)})


def test_summary_and_samples_come_back_as_written(config):
    directory = RunDirectory.create(config())
    progress = Progress(step=4, tokens=40, before=held_out_record(STATS))
    assert directory.read_summary() is None
    directory.write_summary(progress.summary("running"))
    read = directory.read_summary()
    assert read["held_out"]["before"]["reverse_kl"] == {"mean": 1.0, "standard_error": 0.1}
    assert read["held_out"]["after"] is None and read["steps"] == 4 and read["status"] == "running"
    resumed = Progress.resume(state(4), read)
    assert resumed.before == read["held_out"]["before"] and resumed.wall_s > 1.5

    text = {"prompt_id": "p", "prompt": "?\u2028\x85"}  # separators that str.splitlines() cuts at
    directory.add_samples("before", 0, [text | {"response": "a", "ids": [7]}])
    assert directory.samples() == []
    directory.add_samples("after", 4, [text | {"response": "b"}])
    assert directory.samples() == [{"prompt": "?\u2028\x85", "before": "a", "after": "b"}]


def test_a_measurement_is_kept_for_people(config):
    directory = RunDirectory.create(config())
    directory.add_held_out("after", 4, STATS, [{"prompt_id": "p", "ids": [7]}])
    assert json.loads((directory.path / "held_out.jsonl").read_text()) == {
        "phase": "after",
        "step": 4,
        "entropy_bin_nats": 0.2,
        "student_entropy_counts": [2, 7],
        "teacher_entropy_counts": [9, 0],
        "samples": [{"prompt_id": "p", "ids": [7]}],
    }


def test_a_run_names_the_versions_it_was_run_with(config):
    directory = RunDirectory.create(config())
    versions = json.loads((directory.path / "versions.json").read_text())
    assert versions["torch"] == importlib.metadata.version("torch") and versions["eopd"] == eopd.__version__
    assert {"python", "ray", "transformers", "deepspeed", "numpy"} < versions.keys()
    assert any(name.startswith("vllm") for name in versions)


def test_progress_counts_this_process_for_rates_and_the_run_for_totals():
    progress = Progress(step=10, tokens=1000, trajectories=10)
    seconds = {f"eopd_{stage}_seconds": 2.0 for stage in ("step", "generate", "score", "wait", "train", "weights")}
    for step, tokens in ((11, 1100), (12, 1300)):
        totals = {"eopd_step": step, "eopd_response_tokens_total": tokens, "eopd_trajectories_total": step}
        totals["eopd_skipped_steps_total"] = 2
        progress.count(seconds | totals)
    summary = progress.summary("completed")
    assert summary["tokens"] == 1300 and summary["tokens_per_s"] == 300 / 4
    assert summary["skipped_steps"] == 2
    assert summary["step_seconds"]["train"] == 2.0


def test_the_last_rows_are_those_of_the_newest_steps_without_what_was_no_number(config):
    directory = RunDirectory.create(config())
    assert directory.last_rows(3) == []
    sink = JsonlSink(directory.metrics)
    for step in range(1, 5):
        sink.write({"eopd_step": float(step), "eopd_loss": math.nan if step == 4 else 0.5})
    rows = directory.last_rows(2)
    assert [(row["step"], row.get("eopd_loss")) for row in rows] == [(3, 0.5), (4, None)]
    assert abs(rows[-1]["time"] - time.time()) < 60 and "eopd_loss" not in rows[-1]
