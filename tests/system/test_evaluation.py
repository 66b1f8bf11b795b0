"""A run that is measured while it trains, on real Ray, vLLM and DeepSpeed."""

import itertools
import json
import operator
import re
import signal

import pytest
from program import Run, read_rows

WORDS = itertools.product(
    ("read", "sing", "walk", "rest"),
    ("sea", "lake", "fire", "road"),
    ("day", "night", "week", "year"),
)
SENTENCES = [f"I like to {verb} by the {place} every {time}." for verb, place, time in WORDS]
SETTINGS = (
    "run.batches=22",
    "evaluation={every: 6, prompts: 8, max_response_tokens: 32}",
    "checkpoint={every: 100, keep_last: 1, keep_best: {metric: sentences/avg_at_n, mode: max}}",
    "rollout.engines=1",
    "learner.ranks=1",
    "learner.token_budget=160",  # so that batches come in parts
)
pytestmark = pytest.mark.slow
GIVEN_UP = "^the benchmarks under way were given up"


@pytest.fixture(scope="module")
def benchmark(program):
    """Makes a setting: any prompt, and what the teacher answers to it, a sentence of 64."""
    data = program.runs.parent / "sentences.jsonl"
    rows = [
        {"prompt": f"What do you like to do, {name}?", "answer": SENTENCES} for name in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def setting(**more):
        keys = {"name": "sentences", "data": str(data), "samples": 4, "stop": ["."]} | more
        return f"evaluation.benchmarks=[{json.dumps(keys)}]"

    return setting


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
def evaluated(program, benchmark):
    done = program.run(
        *program.train("evaluated", *SETTINGS, benchmark(temperature=0.7, top_p=0.9))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "evaluated", done.stdout


def test_a_run_is_measured_while_it_trains(evaluated):
    directory, output = evaluated
    rows = read_rows(directory / "evaluations.jsonl")
    phases = [(row["step"], row["phase"]) for row in rows if row["name"] == "sentences"]
    during = [(step, "during") for step in (6, 12, 18)]
    assert phases == [(0, "before"), *during, (22, "after")]
    assert phases == [(row["step"], row["phase"]) for row in rows if row["name"] == "held_out"]

    sentences = measured(directory, "sentences")
    right = {step: row["measurements"]["avg_at_n"]["mean"] for step, row in sentences.items()}
    assert right[22] > right[0]

    for step, row in sentences.items():
        assert (row["prompts"], row["samples"]) == (8, 4)
        assert row["measurements"]["lost"]["mean"] == 0, "all answers are of one version"
        assert 0 < row["measurements"]["response_tokens"]["mean"] <= 32
        assert ("differences" in row) == (step > 0)
        assert len(row["by_prompt"]["avg_at_n"]) == 8
        passed = [
            row["measurements"][name]["mean"] for name in ("avg_at_n", "pass_at_2", "pass_at_4")
        ]
        assert passed == sorted(passed)
        assert f"step {step}, sentences: avg@4" in output

    held_out = measured(directory, "held_out")
    first, last = held_out[0], held_out[22]
    for metric, change in last["differences"].items():
        means = (row["measurements"][metric]["mean"] for row in (last, first))
        assert change["mean"] == pytest.approx(operator.sub(*means))

    assert set(last["differences"]) >= {"reverse_kl", "forward_kl", "top1_agreement"}
    assert last["differences"]["reverse_kl"]["standard_error"] > 0
    assert len(last["by_prompt"]["reverse_kl"]) == 8
    assert (
        held_out[22]["measurements"]["reverse_kl"]["mean"]
        < held_out[0]["measurements"]["reverse_kl"]["mean"]
    )
    metrics = read_rows(directory / "metrics.jsonl")
    key = 'eopd_eval_step{evaluation="sentences"}'
    assert [row[key] for row in metrics if key in row] == [0, 6, 12, 18]
    for row in metrics:
        assert row["eopd_staleness_max"] == 0
        assert row["eopd_logprob_gap_nats"] < 1e-3


def test_what_is_trained_in_parts_is_of_the_weights_that_the_learner_held(evaluated):
    directory, _ = evaluated
    rows, timeline = (read_rows(directory / f"{name}.jsonl") for name in ("metrics", "timeline"))
    in_parts = [spans for spans in timeline if len(spans["train"]) > 1]
    assert len(in_parts) > 10, "the learner begins before its batch is whole"
    for row in rows:
        assert row["eopd_staleness_max"] == 0
        assert row["eopd_logprob_gap_nats"] < 1e-3


def test_the_best_checkpoint_stays_and_is_exported(evaluated, program):
    directory, output = evaluated
    values = {
        step: row["measurements"]["avg_at_n"]["mean"]
        for step, row in measured(directory, "sentences").items()
        if step > 0
    }
    best = max(values, key=lambda step: (values[step], -step))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["best"] == {
        "step": best,
        "metric": "sentences/avg_at_n",
        "value": values[best],
    }
    kept = sorted({best, 22})
    checkpoints = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert checkpoints == [f"step-{step:06d}" for step in kept]
    assert f"best checkpoint: step {best}, sentences/avg_at_n" in output

    made = program.run(
        "export",
        str(directory),
        "--best",
        "--output",
        str(directory / "made"),
    )
    assert made.returncode == 0, made.stderr
    assert weights(directory / "made") == weights(directory / "hf-best")
    assert (weights(directory / "hf") == weights(directory / "hf-best")) == (best == 22)
    shown = program.run("status", str(directory)).stdout
    assert "step 22, sentences: avg@4" in shown


def test_a_checkpoint_is_measured_as_the_run_measured_it(evaluated, program):
    directory, _ = evaluated
    before = sorted(path.name for path in directory.iterdir())
    done = program.run("measure", str(directory), "--step", "22", "--json")
    assert done.returncode == 0, done.stderr
    numbers, recorded = json.loads(done.stdout), measured(directory, "held_out")[22]["measurements"]
    assert numbers.keys() == recorded.keys()
    for name, value in numbers.items():
        assert value["mean"] == pytest.approx(recorded[name]["mean"], rel=1e-3, abs=1e-4)

    assert sorted(path.name for path in directory.iterdir()) == before
    assert program.left_behind() == []


def test_whoever_is_killed_in_a_benchmark_its_numbers_are_whole(program, benchmark):
    """An engine in the first one, a learner rank in the second, the run itself in the third; the
    last one is under way when the run is asked to end.
    """
    long = benchmark(samples=32, temperature=2, max_response_tokens=200, stop=[])
    settings = (
        *SETTINGS,
        "run.batches=8",
        "evaluation.every=2",
        "rollout.engines=2",
        "rollout.vllm.distributed_executor_backend=mp",  # an engine in a process of its own
        long,
    )
    run = Run(program, "evaluated-killed", *settings)
    engine = run.engine()
    run.says(r"^step 0, held out", after=0)
    engine.kill()
    (rank,) = run.actors("LearnerActor")
    run.says(r"^rollout engine \d: its engine died; going on with 1 of 2", after=0)
    assert measured(run.directory, "sentences") == {}
    failures = run.wait(lambda row: row["step"] >= 1)["eopd_engine_failures_total"]
    assert failures > 8, "it held answers of the benchmark, beside those of a batch"

    run.says(r"^step 2, held out", after=0)
    rank.kill()
    assert measured(run.directory, "sentences").keys() == {0}
    run.says("^the learner was lost", after=0)  # in the benchmark, or when it is next needed

    run.says(r"^step 4, held out", after=0)
    run.process.kill()
    run.process.wait()
    assert program.left_behind(grace_s=60) == []
    assert measured(run.directory, "sentences").keys() == {0, 2}

    one = "rollout.engines=1"  # of which a run may have fewer when it goes on
    run = Run(program, "evaluated-killed", *settings, one, options=["--resume"])
    said = run.says(r"^step 6, held out", after=0)
    run.process.send_signal(signal.SIGTERM)
    assert re.search(GIVEN_UP, run.ended(130)[said.start() :], re.M)
    assert program.left_behind() == []

    names = [(row["step"], row["name"]) for row in read_rows(run.directory / "evaluations.jsonl")]
    done = [(step, name) for step in (0, 2, 4) for name in ("held_out", "sentences")]
    assert sorted(names) == [*done, (6, "held_out")]
    for row in measured(run.directory, "sentences").values():
        assert (row["prompts"], row["samples"]) == (8, 32)
        assert row["measurements"]["lost"]["mean"] == 0
        assert {len(numbers) for numbers in row["by_prompt"].values()} == {8}

    summary, trained = run.summary(), read_rows(run.directory / "trained.jsonl")
    assert summary["status"] == "interrupted"
    assert summary["steps"] in (6, 7)
    assert (run.directory / "checkpoints" / f"step-{summary['best']['step']:06d}").is_dir()
    issues = [issue for row in trained for issue in row["issues"]]
    assert issues == list(range(8 * summary["steps"])), "each is trained once"
