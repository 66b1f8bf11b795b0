"""Checkpoints are whole or absent; a run directory is neither overwritten nor continued as something else."""

import json

import pytest

from eopd.checkpoint import DriverState, list_checkpoints, write_checkpoint
from eopd.config import ConfigError, load_config
from eopd.ledger import Ledger
from eopd.runtime.progress import Progress
from eopd.runtime.run_directory import RunDirectory, held_out_record
from eopd.types import Estimate, EvalStats


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


async def test_the_newest_checkpoints_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 3):
        await write_checkpoint(tmp_path, state(step), save, keep_last=2)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert DriverState.read(list_checkpoints(tmp_path)[-1]) == state(3)
    assert (tmp_path / "step-000003/learner/weights").read_text() == "w"


async def test_a_checkpoint_that_failed_half_way_is_none_and_the_old_one_stays(tmp_path):
    await write_checkpoint(tmp_path, state(1), save, keep_last=1)

    async def broken(directory):
        await save(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await write_checkpoint(tmp_path, state(2), broken, keep_last=1)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-000001"]
    await write_checkpoint(tmp_path, state(2), save, keep_last=1)
    assert [c.name for c in tmp_path.iterdir()] == ["step-000002"]


async def test_a_run_is_not_overwritten_and_resumes_only_as_itself(config):
    RunDirectory.create(config()).add_samples("before", 0, [{"prompt_id": "p", "prompt": "?", "response": "a"}])
    directory = RunDirectory.create(config("learner.lr=1.0e-6"))  # no step yet: begun again
    assert not (directory.path / "samples.jsonl").exists()
    directory.metrics.write_text("")
    with pytest.raises(ConfigError, match=r"run.name: .* exists; continue it with --resume"):
        RunDirectory.create(config())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        RunDirectory.reopen(config())
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    refusal = (
        r"learner.lr was 1e-06 and is 0.1; only checkpoint, telemetry, cluster, "
        r"learner.ranks, learner.cpus, learner.gpus, learner.threads, learner.timeout_s, rollout.timeout_s may change"
    )
    with pytest.raises(ConfigError, match=refusal):
        RunDirectory.reopen(config("learner.lr=0.1"))
    assert RunDirectory.reopen(config("checkpoint.every=7")).path == directory.path
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.reopen(config("run.name=other"))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ("learner.ranks=2 learner.cpus=0.5 learner.gpus=1 learner.threads=3", None),
        ("checkpoint.keep_last=1 telemetry.port=null cluster.cpus=3", None),
        ("learner.zero_stage=2", "learner.zero_stage was 1 and is 2"),
        ("learner.token_budget=9000", "learner.token_budget was 8192 and is 9000"),
        ("learner.deepspeed.ranks=2", "learner.deepspeed.ranks was None and is 2"),
        ("rollout.cpus=2", "rollout.cpus was 1.0 and is 2"),
        ("run.batches=3", "run.batches was 2 and is 3"),
    ],
)
async def test_a_resumed_run_may_change_its_place_and_nothing_else(config, changes, refused):
    directory = RunDirectory.create(config())
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    changed = config(*changes.split())
    if refused is None:
        RunDirectory.reopen(changed)
        assert load_config(directory.path / "config.yaml") == changed
    else:
        with pytest.raises(ConfigError, match=refused):
            RunDirectory.reopen(changed)
        assert load_config(directory.path / "config.yaml") == config()


async def test_round_robin_gradients_fix_the_number_of_ranks(config):
    native = "learner.deepspeed={zero_optimization: {round_robin_gradients: true}}"
    directory = RunDirectory.create(config(native))
    await write_checkpoint(directory.checkpoints, state(1), save, keep_last=1)
    RunDirectory.reopen(config(native, "learner.threads=2"))
    with pytest.raises(ConfigError, match=r"learner.ranks was 1 and is 2; only .*cluster, learner.cpus, .* may change"):
        RunDirectory.reopen(config(native, "learner.ranks=2"))


def test_rows_after_the_checkpoint_are_dropped(config):
    directory = RunDirectory.create(config())
    directory.metrics.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)))
    directory.drop_rows_after(2)
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == [1, 2]


def test_summary_and_samples_come_back_as_written(config):
    directory = RunDirectory.create(config())
    one = Estimate(mean=1.0, standard_error=0.1)
    names = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    stats = EvalStats(**dict.fromkeys(names, one), num_trajectories=2, num_tokens=9)
    progress = Progress(step=4, tokens=40, before=held_out_record(stats))
    directory.write_summary(progress.summary("running"))
    read = directory.read_summary()
    assert read["held_out"]["before"]["reverse_kl"] == {"mean": 1.0, "standard_error": 0.1}
    assert read["held_out"]["after"] is None and read["steps"] == 4 and read["status"] == "running"
    resumed = Progress.resume(state(4), read)
    assert resumed.before == read["held_out"]["before"] and resumed.wall_s > 1.5

    text = {"prompt_id": "p", "prompt": "?\u2028\x85"}  # separators that str.splitlines() cuts at
    directory.add_samples("before", 0, [text | {"response": "a"}])
    assert directory.samples() == []
    directory.add_samples("after", 4, [text | {"response": "b"}])
    assert directory.samples() == [{"prompt": "?\u2028\x85", "before": "a", "after": "b"}]


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
