"""The whole program on real Ray, vLLM and DeepSpeed: two rollout engines, a teacher, two
learner ranks. Undisturbed, and once with its driver killed and its newest checkpoint cut short: equal
to the token.
"""

import json
import random
import re
import time

import pytest
import yaml
from program import Run, read_rows

from eopd.run.checkpoint import list_checkpoints

CONTINUED_FROM, COMPARED = 10, 15  # steps
ONE = "rollout.engines=1"  # whichever engine writes a response, it is the same
PARAMETERS = ("reverse_kl", "forward_kl", "student_entropy", "top1_agreement")


@pytest.fixture(scope="module")
def synchronous(program):
    """One run from beginning to end."""
    done = program.run(*program.train("synchronous"))
    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "synchronous", done.stdout


def rows(directory):
    return read_rows(directory / "metrics.jsonl")


def test_held_out_reverse_kl_at_least_halves(synchronous):
    directory, _ = synchronous
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["steps"] == 30
    assert summary["wall_s"] > 0
    assert summary["tokens"] == rows(directory)[-1]["eopd_response_tokens_total"]
    before = summary["held_out"]["before"]
    after = summary["held_out"]["after"]
    for name in PARAMETERS:
        for measured in (before[name], after[name]):
            assert 0 < measured["standard_error"] < 0.5 * max(1.0, abs(measured["mean"]))

    assert after["reverse_kl"]["mean"] < 0.5 * before["reverse_kl"]["mean"]
    assert after["forward_kl"]["mean"] < 0.5 * before["forward_kl"]["mean"]
    assert after["top1_agreement"]["mean"] > before["top1_agreement"]["mean"]


def test_every_token_was_sampled_by_the_weights_the_learner_held(synchronous):
    """The learner recomputes each token's log-probability before its update. Were an engine one
    version behind, or its weights not those that were sent, the gap would be that of a step (here:
    above 0.02 nats), not of float32."""
    directory, _ = synchronous
    found = rows(directory)
    assert [row["step"] for row in found] == list(range(1, 31))

    for row in found:
        assert row["eopd_staleness_max"] == row["eopd_staleness_mean"] == 0
        assert row["eopd_logprob_gap_nats"] < 1e-3
        assert row["eopd_importance_weight_mean"] == pytest.approx(1.0, abs=1e-3)
        assert row["eopd_weight_bytes"] > 100_000

    probed = {
        row["step"]: row["eopd_weight_probe_nats"]
        for row in found
        if "eopd_weight_probe_nats" in row
    }
    assert list(probed) == [10, 20, 30]
    assert 0 < max(probed.values()) < 1e-4


def test_the_run_directory_is_the_contract(synchronous):
    directory, output = synchronous
    assert {p.name for p in directory.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "trained.jsonl",
        "timeline.jsonl",
        "evaluations.jsonl",
        "held_out.jsonl",
        "versions.json",
        "report.html",
        "checkpoints",
        "hf",
        "logs",
        "run.lock",  # stays; who runs the run holds it
    }
    logs = {path.stem: path.read_text().split("\n")[:-1] for path in (directory / "logs").iterdir()}
    assert {"driver", "rollout-0", "rollout-1", "teacher-teacher-0"} <= set(logs)
    assert all(line.split(" ")[1] == role for role, lines in logs.items() for line in lines)
    assert any(
        "measuring on 32 held-out prompts, after training" in line for line in logs["driver"]
    )
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == [
        "step-000020",
        "step-000030",
    ]
    assert yaml.safe_load((directory / "config.yaml").read_text())["learner"]["ranks"] == 2
    trained = [json.loads(line) for line in (directory / "trained.jsonl").read_text().splitlines()]
    assert [row["issues"] for row in trained] == [
        list(range(8 * step, 8 * step + 8)) for step in range(30)
    ]
    assert "step 30/30" in output
    assert "top-1 agreement" in output
    assert f"report: {directory}/report.html" in output


def test_timelines_and_held_out_tokens_fit_what_was_measured(synchronous):
    directory, _ = synchronous
    timeline = [
        json.loads(line) for line in (directory / "timeline.jsonl").read_text().splitlines()
    ]

    for row, spans in zip(rows(directory), timeline, strict=True):
        assert spans["step"] == row["step"]
        for stage in ("generate", "score", "wait_rollout", "wait_teacher", "train", "weights"):
            assert sum(b - a for a, b in spans[stage]) == pytest.approx(
                row[f"eopd_{stage}_seconds"], abs=0.01
            )

    summary = json.loads((directory / "summary.json").read_text())["held_out"]
    measured = [
        json.loads(line) for line in (directory / "held_out.jsonl").read_text().splitlines()
    ]
    assert [one["phase"] for one in measured] == ["before", "after"]
    before, after = ([sample["prompt_id"] for sample in one["samples"]] for one in measured)
    assert before == after and len(before) == 3

    for one in measured:
        for who in ("student", "teacher"):
            counts = one[f"{who}_entropy_counts"]
            mean = sum(0.2 * (i + 0.5) * count for i, count in enumerate(counts)) / sum(counts)
            assert mean == pytest.approx(summary[one["phase"]][f"{who}_entropy"]["mean"], abs=0.1)

        for sample in one["samples"]:
            assert "".join(sample["texts"][str(i)] for i in sample["ids"]).startswith(
                sample["response"][:1]
            )
            assert sample["entropy_low"] == sample["entropy_high"]
            assert min(sample["entropy_low"]) >= 0

            for i, ids in enumerate(sample["topk_ids"]):
                if (token := sample["ids"][i]) in ids:
                    listed = sample["topk_logprobs"][i][ids.index(token)]
                    assert listed == pytest.approx(sample["teacher_logprobs"][i], abs=1e-3)


def test_every_second_of_the_run_has_a_stage_or_a_cause(synchronous):
    directory, _ = synchronous
    found = rows(directory)
    for row in found:
        parts = ("wait_rollout", "wait_teacher", "train", "weights")
        known = sum(row[f"eopd_{part}_seconds"] for part in parts)
        assert 0.95 * row["eopd_step_seconds"] <= known <= 1.01 * row["eopd_step_seconds"]
        assert row["eopd_step_accounted_ratio"] == pytest.approx(known / row["eopd_step_seconds"])

    # of the clock of the file, which knows nothing of steps
    passed = found[-1]["time"] - found[0]["time"]
    steps = sum(row["eopd_step_seconds"] for row in found[1:])
    between = sum(row["eopd_between_steps_seconds"] for row in found[1:])
    assert steps + between == pytest.approx(passed, rel=0.05)

    # a checkpoint is written between its step and the next one
    for row in found[10::10]:
        assert row["eopd_checkpoint_step"] == row["step"] - 1
        assert row["eopd_between_steps_seconds"] >= row["eopd_checkpoint_seconds"]


def test_the_exported_student_is_the_trained_one(synchronous, program):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = synchronous
    trained = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(program.models / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(program.models / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / "hf")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])

    with torch.no_grad():
        whole = teacher.generate(ids, max_new_tokens=12, do_sample=False)
        rows = slice(ids.shape[1] - 1, -1)  # those that predict the response
        expected = teacher(whole).logits[0, rows].softmax(-1)
        kls = [
            torch.nn.functional.kl_div(
                m(whole).logits[0, rows].log_softmax(-1),
                expected,
                reduction="sum",
            )
            for m in (initial, trained)
        ]

    assert kls[1] < 0.5 * kls[0]


# --- and once its driver is killed, and its newest checkpoint cut short


@pytest.fixture(scope="module")
def killed(program):
    """The settings of ``synchronous`` but for an engine, and a driver killed after its second checkpoint; with
    what was left running.
    """
    run = Run(program, "killed", ONE)
    run.wait(lambda row: row["step"] >= 21)
    time.sleep(random.uniform(0, 1))  # anywhere in a step
    run.process.kill()
    run.process.wait()
    return run.directory, program.left_behind(grace_s=60)


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


def measured_before(directory):
    return summary_of(directory)["held_out"]["before"]


@pytest.fixture(scope="module")
def resumed(program, killed):
    """The same, continued, after its newest checkpoint lost its last byte."""
    directory, _ = killed
    older, newest = list_checkpoints(directory / "checkpoints")
    assert older.name == f"step-{CONTINUED_FROM:06d}"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("rb+") as file:
        file.truncate(largest.stat().st_size - 1)

    before = measured_before(directory)
    done = program.run(*program.train("killed", ONE), "--resume")
    assert measured_before(directory) == before, "the measurement before training is kept"

    return directory, done, older, newest


def test_nothing_outlives_a_driver_that_was_killed(killed):
    _, left = killed
    assert left == []


def test_the_newest_whole_checkpoint_is_resumed(resumed):
    directory, done, older, newest = resumed
    assert done.returncode == 0, done.stdout + done.stderr
    message = f"passing over {newest}: learner/"
    assert message in done.stdout.replace("\n", "")
    assert f"the newest that is whole is {older.name}" in done.stdout
    assert summary_of(directory)["status"] == "completed"
    checkpoints = directory / "checkpoints"
    names = [path.name for path in list_checkpoints(checkpoints)]
    assert names == ["step-000020", "step-000030"]
    assert len(list(checkpoints.iterdir())) == 2


def test_it_trains_every_number_once_in_order_and_the_same_tokens(resumed, synchronous):
    directory, undisturbed = resumed[0], synchronous[0]
    trained = read_rows(directory / "trained.jsonl")
    expected = read_rows(undisturbed / "trained.jsonl")
    assert len(trained) == 30
    for number, row in enumerate(trained):
        assert row["step"] == number + 1
        assert row["issues"] == list(range(8 * number, 8 * number + 8))

    # token by token, with the checksums of the responses
    assert trained[:COMPARED] == expected[:COMPARED]
    assert len({tuple(row["crc32"]) for row in trained}) == 30


def test_its_losses_are_those_of_an_undisturbed_run(resumed, synchronous):
    directory, undisturbed = resumed[0], synchronous[0]
    found = read_rows(directory / "metrics.jsonl")
    expected = read_rows(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 31))
    for name in (
        "eopd_loss",
        "eopd_grad_norm",
        "eopd_learning_rate",
        "eopd_response_tokens_total",
    ):
        ours = [row[name] for row in found[:COMPARED]]
        theirs = [row[name] for row in expected[:COMPARED]]
        assert ours == pytest.approx(theirs, abs=1e-3), name


@pytest.mark.slow
def test_a_failure_leaves_no_process_and_says_failed(program):
    command = program.train(
        "broken",
        "teachers.0.vllm={quantization: awq}",
        "rollout.engines=1",
        "learner.ranks=1",
    )
    done = program.run(*command)
    assert done.returncode == 1
    failed = r"^error: the teacher teacher replica 0 did not start: \w+: .+"
    assert re.search(rf"{failed}; logs in .+/broken/logs$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    logs = program.runs / "broken" / "logs"
    assert "Traceback" in (logs / "driver.log").read_text()
    of_teacher = (logs / "teacher-teacher-0.log").read_text()
    assert "awq" in of_teacher
    assert json.loads((program.runs / "broken" / "summary.json").read_text())["status"] == "failed"
    assert program.left_behind() == []


@pytest.mark.slow
def test_asking_for_more_than_the_machine_has_is_one_message(program):
    done = program.run(*program.train("greedy", "learner.cpus=4"))
    assert done.returncode == 2
    assert (
        "error: the roles ask for 8.75 cpus (learner 2 x 4, rollout 2 x 0.25, teacher "
        "teacher 1 x 0.25)" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (program.runs / "greedy").exists()
    assert program.left_behind() == []
