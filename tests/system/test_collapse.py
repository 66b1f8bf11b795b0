"""A run that is made to collapse: student and teacher end with different tokens. What a person does
about it is tried too.
"""

import json
import re

import pytest
from program import Run, read_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher that ends with another token than its tokenizer says, and a student that would
    answer as it does.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eopd.models.tiny import write_model, write_tiny_pair

    root = tmp_path_factory.mktemp("collapse")
    student, _ = write_tiny_pair(root, family="llama")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    with torch.no_grad():
        model.lm_head.weight[ends] = model.lm_head.weight[ends[::-1]].clone()

    return student, write_model(root / "other-end", model, tokenizer)


def steps_to_keep(last, logs):
    """The steps whose responses are kept: every second one, but for those that the log says were
    passed over.
    """
    passed_over = set(map(int, re.findall(r"the responses of step (\d+) are not kept", logs)))
    assert len(passed_over) < 5
    return [step for step in range(2, last + 1, 2) if step not in passed_over]


@pytest.mark.slow
def test_a_collapse_ends_the_run_with_what_it_takes_to_go_back(program, models):
    student, teacher = models
    settings = [
        f"student.model={student}",
        f"teachers.0.model={teacher}",
        "rollout.engines=1",
        "rollout.max_response_tokens=96",
        "learner.ranks=1",
        "learner.lr=2e-4",
        "run.batches=80",
        "checkpoint={every: 5, keep_last: 3, keep_best: {metric: held_out/reverse_kl, mode: min}}",
        "evaluation={every: 10, prompts: 4, max_response_tokens: 96}",
        "telemetry.responses={every: 2, prompts: 1}",
    ]
    train = program.train("collapse", *settings)
    done = program.run(*train, "--set", "guard.on_collapse=stop")
    assert done.returncode == 1, done.stdout + done.stderr
    directory = program.runs / "collapse"
    summary = json.loads((directory / "summary.json").read_text())
    rows = read_rows(directory / "metrics.jsonl")
    last = rows[-1]["step"]
    assert summary["status"] == "collapsed"
    assert summary["steps"] == last < 60
    assert [row["eopd_collapse"] for row in rows] == [0.0] * (last - 1) + [1.0]
    assert done.stdout.count("the student collapses: over steps") == 1
    assert "the guard has ended the run" in done.stdout
    assert "continue with" not in done.stdout
    assert (directory / "hf" / "model.safetensors").exists()

    steps = [int(path.name[-6:]) for path in sorted((directory / "checkpoints").iterdir())]
    best = summary["best"]["step"]
    assert steps[-1] == last
    (way_back,) = set(re.findall(r"go back with --resume --step (\d+)", done.stdout))
    assert {int(way_back), best} <= set(steps), "the last one has replaced neither"
    assert (directory / "hf-best" / "model.safetensors").exists()
    assert f"hf-best/ the best that was measured, of step {best}. " in done.stdout
    kept = read_rows(directory / "responses.jsonl")
    logs = program.run("logs", str(directory), "--role", "driver", "--lines", "9999").stdout
    assert [row["step"] for row in kept] == steps_to_keep(last, logs)
    assert all(len(row["ids"]) == len(row["entropy_low"]) for row in kept)

    shown = program.run("show", str(directory), "--step", "2").stdout
    assert "step 2, prompt " in shown
    assert "I like to " in shown
    listed = program.run("list", str(program.runs)).stdout
    assert f"{last}/80" in next(line for line in listed.splitlines() if "collapse " in line)
    assert "the guard has ended the run" in logs

    # it would end again
    again = program.run(*train, "--set", "guard.on_collapse=stop", "--resume", "auto")
    assert again.returncode == 2
    assert f"guard.on_collapse: is stop, and at step {last} of {directory}" in again.stderr

    run = Run(
        program,
        "collapse",
        *settings,
        options=["--resume", "--step", str(steps[0])],
    )
    try:
        run.wait(lambda row: steps[0] + 2 <= row["step"] < last)
        stopped = program.run("stop", str(directory))
        said = run.ended(130)
    finally:
        run.close()

    assert stopped.returncode == 0, stopped.stderr
    assert f"{directory} has ended: interrupted" in stopped.stdout
    assert "stopping after the step under way, with a checkpoint" in said
    summary = run.summary()
    assert steps[0] + 2 <= summary["steps"] < last
    assert (directory / "checkpoints" / f"step-{summary['steps']:06d}").exists()
    now = [row["step"] for row in read_rows(directory / "responses.jsonl")]
    so_far = [row["step"] for row in kept if row["step"] <= steps[0]]
    added = program.run("logs", str(directory), "--role", "driver", "--lines", "9999").stdout
    expected = steps_to_keep(summary["steps"], added.removeprefix(logs))
    assert now == so_far + [step for step in expected if step > steps[0]]
    assert program.left_behind() == []
