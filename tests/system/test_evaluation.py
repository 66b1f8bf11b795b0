"""A run that is measured while it trains, on real Ray, vLLM and DeepSpeed."""

import json
import signal

import pytest
from program import Run, read_rows

ARITHMETIC = (
    "{name: arithmetic, data: configs/prompts/arithmetic.jsonl, grader: math, prompts: 8, "
    "samples: 2, temperature: 0.7, top_p: 0.9, stop: ['.']}"
)
SETTINGS = (
    "run.batches=7",
    f"evaluation={{every: 2, prompts: 8, max_response_tokens: 24, benchmarks: [{ARITHMETIC}]}}",
    "checkpoint={every: 100, keep_last: 1, keep_best: {metric: arithmetic/distinct_2, mode: max}}",
    "rollout.engines=1",
    "learner.ranks=1",
)


def measured(directory, name):
    """The evaluations of a name, by step."""
    rows = read_rows(directory / "evaluations.jsonl")
    return {row["step"]: row for row in rows if row["name"] == name}


def weights(directory):
    from safetensors.numpy import load_file

    return {
        name: value.tobytes() for name, value in load_file(directory / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def evaluated(program):
    done = program.run(*program.train("evaluated", *SETTINGS))
    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "evaluated", done.stdout


def test_a_run_is_measured_while_it_trains(evaluated):
    directory, output = evaluated
    rows = read_rows(directory / "evaluations.jsonl")
    phases = [(row["step"], row["phase"]) for row in rows if row["name"] == "arithmetic"]
    during = [(step, "during") for step in (2, 4, 6)]
    assert phases == [(0, "before"), *during, (7, "after")]
    assert phases == [(row["step"], row["phase"]) for row in rows if row["name"] == "held_out"]

    for step, row in measured(directory, "arithmetic").items():
        assert (row["prompts"], row["samples"]) == (8, 2)
        assert row["measurements"]["lost"]["mean"] == 0, "all answers are of one version"
        assert 0 < row["measurements"]["response_tokens"]["mean"] <= 24
        assert ("differences" in row) == (step > 0)
        assert len(row["by_prompt"]["avg_at_n"]) == 8
        assert f"step {step}, arithmetic: avg@2" in output

    held_out = measured(directory, "held_out")
    assert (
        held_out[7]["measurements"]["reverse_kl"]["mean"]
        < (held_out[0]["measurements"]["reverse_kl"]["mean"])
    )
    metrics = read_rows(directory / "metrics.jsonl")
    key = 'eopd_eval_distinct_ratio{benchmark="arithmetic",n="2"}'
    assert [row["step"] for row in metrics if key in row] == [1, 3, 5, 7]
    for row in metrics:
        assert row["eopd_staleness_max"] == 0
        assert row["eopd_logprob_gap_nats"] < 1e-3


def test_the_best_checkpoint_stays_and_is_exported(evaluated, program):
    directory, output = evaluated
    values = {
        step: row["measurements"]["distinct_2"]["mean"]
        for step, row in measured(directory, "arithmetic").items()
        if step > 0
    }
    best = max(values, key=lambda step: (values[step], -step))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["best"] == {
        "step": best,
        "metric": "arithmetic/distinct_2",
        "value": values[best],
    }
    kept = sorted({best, 7})
    checkpoints = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert checkpoints == [f"step-{step:06d}" for step in kept]
    assert f"best checkpoint: step {best}, arithmetic/distinct_2" in output

    made = program.run("export", str(directory), "--best", "--output", str(directory / "made"))
    assert made.returncode == 0, made.stderr
    assert weights(directory / "made") == weights(directory / "hf-best")
    assert (weights(directory / "hf") == weights(directory / "hf-best")) == (best == 7)
    shown = program.run("status", str(directory)).stdout
    assert "step 7, arithmetic: avg@2" in shown


@pytest.mark.slow
def test_a_checkpoint_is_measured_as_the_run_measured_it(evaluated, program):
    directory, _ = evaluated
    before = sorted(path.name for path in directory.iterdir())
    done = program.run("measure", str(directory), "--step", "7", "--json")
    assert done.returncode == 0, done.stderr
    numbers, recorded = json.loads(done.stdout), measured(directory, "held_out")[7]["measurements"]
    assert numbers.keys() == recorded.keys()
    for name, value in numbers.items():
        assert value["mean"] == pytest.approx(recorded[name]["mean"], rel=1e-3, abs=1e-4)

    assert sorted(path.name for path in directory.iterdir()) == before
    assert program.left_behind() == []


@pytest.mark.slow
def test_a_killed_run_measures_what_it_had_not_and_keeps_its_best(program):
    many = ARITHMETIC.replace("prompts: 8, samples: 2", "samples: 8")
    settings = (
        *SETTINGS,
        "run.batches=6",
        f"evaluation.benchmarks=[{many}]",
        "evaluation.max_response_tokens=100",
        "learner.token_budget=1024",
    )
    run = Run(program, "evaluated-killed", *settings)
    run.says(r"^step 2, held out", after=0)
    run.process.kill()
    run.process.wait()
    assert program.left_behind(grace_s=60) == []
    already = measured(run.directory, "arithmetic")

    done = program.run(*program.train("evaluated-killed", *settings), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(already) <= {0, 2}
    rows = read_rows(run.directory / "evaluations.jsonl")
    names = [(row["step"], row["name"]) for row in rows]
    assert sorted(names) == [
        (step, name) for step in (0, 2, 4, 6) for name in ("arithmetic", "held_out")
    ]
    assert {row["measurements"]["lost"]["mean"] for row in rows if row["name"] == "arithmetic"} == {
        0
    }
    summary = json.loads((run.directory / "summary.json").read_text())
    assert (run.directory / "checkpoints" / f"step-{summary['best']['step']:06d}").is_dir()


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_a_benchmark(program):
    many = ARITHMETIC.replace("prompts: 8, samples: 2", "samples: 32").replace("0.7", "3")
    settings = (
        *SETTINGS,
        f"evaluation.benchmarks=[{many}]",
        "evaluation.max_response_tokens=400",
        "learner.token_budget=1024",
    )
    run = Run(program, "interrupted-benchmark", *settings)
    said = run.says(r"^step 0, held out", after=0)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=120) == 130
    log = run.log.read_text()[said.start() :]
    assert "the benchmarks under way were given up" in log
    assert measured(run.directory, "arithmetic") == {}
    assert run.summary()["status"] == "interrupted"
    assert program.left_behind() == []
