"""Evaluation in a run, on fake workers: what is due, what is recorded, what people and metrics see."""

import asyncio
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import fakes
import numpy as np
import pytest

from eopd.config import load_config
from eopd.evaluation.beside import OneVersion
from eopd.preflight import Prepared
from eopd.prompts import PromptSet
from eopd.rewards.verdict import Verdict
from eopd.run.evaluations import read_evaluations
from eopd.run.upload import Uploads
from eopd.runtime.evaluating import Evaluator
from eopd.runtime.resume import take_up
from eopd.runtime.state import RunState
from eopd.tokenizer import load_tokenizer
from eopd.types import EvalStats, Sampling, StopReason

INPUTS = {"prompts.data": "1", "student.model": "2"}
PROMPTS = [fakes.prompt(name, answer="7") for name in "ab"]
WORDS = {"right": "#### 7", "wrong": "#### 8"}


def prompt_set(prompts):
    return PromptSet(
        prompts=tuple(prompts),
        parts=(tuple(prompts),),
        texts={prompt.prompt_id: "?" for prompt in prompts},
        places={},
        notes=(),
    )


class Workers(fakes.World):
    """Engines that answer as ``says`` tells by prompt, once they are ``free``; and all others."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.ids = {word: tokenizer.encode(text) for word, text in WORDS.items()}
        self.says = {"a": "right", "b": "wrong"}
        self.free = asyncio.Event()
        self.free.set()
        self.asked: list[tuple[str, int, int]] = []
        self.priorities: list[int] = []
        self.engines = self.teacher = self.learner = self.channel = self
        self.joined: list[int] = []
        self.fleet = SimpleNamespace(join=self.join, pool=SimpleNamespace(num_up=1))

    async def join(self, number, engine):
        self.joined.append(number)

    async def generate(self, of, sample_index, sampling):
        await self.free.wait()
        self.asked.append((of.prompt_id, sample_index, sampling.seed))
        self.priorities.append(sampling.priority)
        body = fakes.trajectory(
            self.ids[self.says.get(of.prompt_id, "wrong")],
            of=of,
            sample_index=sample_index,
            version=self.served,
            stop=StopReason.END_TOKEN,
        )
        return fakes.stored(body)

    async def evaluate(self, batch):
        mean = 1.0 / (1 + self.served)
        return EvalStats(
            by_prompt={
                "reverse_kl": {"a": 2 * mean, "b": 2 / 3 * mean},
                "tokens": {"a": 1.0, "b": 3.0},
            },
            student_entropy_counts=(1,),
            teacher_entropy_counts=(1,),
        )

    async def save(self, directory):
        await fakes.save_weights(directory)


class Outlets:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: dict[str, float] = {}
        self.phases: list[str] = []

    @contextmanager
    def phase(self, phase):
        self.phases.append(phase)
        yield

    def say(self, text):
        self.said.append(text)

    def doing(self, text):
        self.said.append(text)

    def show_state(self, row):
        self.shown |= row


async def fetch(stored):
    return stored.body


@pytest.fixture
def made(tmp_path, tiny_model):
    model = tiny_model("qwen3", seed=1)

    def make(evaluation: str, *, resume: str = "no", **more: str) -> SimpleNamespace:
        text = "".join(f"{section}: {value}\n" for section, value in more.items())
        path = fakes.write_config(
            tmp_path,
            batches=20,
            student=f"{{model: {model}}}",
            more=f"evaluation: {evaluation}\n{text}",
        )
        config = load_config(path)
        taken_up = take_up(config, INPUTS, resume)
        taken_up.begin()
        state, outlets = RunState(taken_up, Uploads(taken_up.config, print)), Outlets()
        state.go_on()
        workers = Workers(load_tokenizer(model))
        prepared = Prepared(
            train=prompt_set(PROMPTS),
            held_out=prompt_set(PROMPTS),
            vocabularies={},
            benchmarks={
                benchmark.name: prompt_set(PROMPTS) for benchmark in config.evaluation.benchmarks
            },
        )
        evaluator = Evaluator(
            config,
            prepared,
            state,
            workers,
            outlets,
            lambda: None,
            fetch,
        )

        def at(step: int) -> None:
            state.progress.step = workers.served = step

        return SimpleNamespace(**locals())

    return make


MATH = "{name: math, data: m.jsonl, samples: 2}"


def lines(run) -> list[tuple[int, str, str]]:
    """What was recorded: step, phase and name."""
    return [(one.step, one.phase, one.name) for one in run.state.evaluations]


async def test_each_name_is_measured_when_it_is_due(made):
    often = "{name: often, data: o.jsonl, every: 2}"
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}, {often}]}}")
    for step in range(11):
        run.at(step)
        await run.evaluator.evaluate("during" if step else "before")

    await run.evaluator.evaluate("after")
    assert sorted(lines(run)) == sorted(
        [
            *((0, "before", name) for name in ("held_out", "math", "often")),
            *((step, "during", name) for step in (5, 10) for name in ("held_out", "math")),
            *((step, "during", "often") for step in (2, 4, 6, 8, 10)),
            *((10, "after", name) for name in ("held_out", "math", "often")),
        ]
    )
    written = read_evaluations(run.state.directory.evaluations)
    kept = [replace(one, by_prompt={}) for one in run.state.evaluations]
    assert [replace(one, by_prompt={}) for one in written] == kept


async def test_without_a_period_the_two_ends_are_measured(made):
    run = made(f"{{samples: 0, benchmarks: [{MATH}]}}")
    for step in range(11):
        run.at(step)
        await run.evaluator.evaluate("during" if step else "before")

    await run.evaluator.evaluate("after")
    assert {step for step, _, _ in lines(run)} == {0, 10}
    assert run.outlets.phases == ["measuring", "measuring"]
    summary = run.state.directory.read_summary()
    assert summary.held_out.before["reverse_kl"].mean == 1.0
    assert summary.held_out.after["reverse_kl"].mean == pytest.approx(1 / 11)


async def test_seeds_and_prompts_are_the_same_each_time(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    asked = []
    for step in (0, 5, 10):
        run.at(step)
        run.workers.asked = []
        await run.evaluator.evaluate("during" if step else "before")
        await run.evaluator.beside.finish()
        asked.append(sorted(run.workers.asked))

    assert asked[0] == asked[1] == asked[2]
    assert len({seed for _, _, seed in asked[0]}) == 6  # two held out, and two of two
    assert max(run.workers.priorities) < 0, "they go before the requests of training"


async def test_a_new_engine_waits_for_a_benchmark_unless_no_other_is_up(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    run.at(0)
    await run.evaluator.evaluate("before")
    fleet, joined = run.workers.fleet, run.workers.joined

    async with asyncio.timeout(10):
        await run.evaluator.beside.finish()
        await fleet.join(0, None)
        assert joined == [0]

        run.workers.free.clear()
        engines = OneVersion(run.workers, 0, 1)
        sampling = Sampling(temperature=1.0, max_tokens=1, seed=0)
        run.evaluator.beside.start(
            engines,
            engines.generate(
                PROMPTS[0],
                0,
                sampling,
            ),
        )
        joining = asyncio.create_task(fleet.join(1, None))
        await asyncio.sleep(0.6)
        assert not joining.done()

        fleet.pool.num_up = 0
        await joining
        assert run.evaluator.beside.left == 1, "it is what will be asked"

        fleet.pool.num_up = 1
        joining = asyncio.create_task(fleet.join(2, None))
        await asyncio.sleep(0)
        assert not joining.done()

        run.workers.free.set()
        await joining

    assert joined == [0, 1, 2]


async def test_later_measurements_are_paired_with_the_first(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    for step, says in ((0, "wrong"), (5, "right")):
        run.at(step)
        run.workers.says["b"] = says
        await run.evaluator.evaluate("during" if step else "before")
        await run.evaluator.beside.finish()

    first, later = (one for one in run.state.evaluations if one.name == "math")
    assert first.measurements["avg_at_n"].mean == 0.5
    assert first.measurements["pass_at_2"].mean == 0.5
    assert first.measurements["lost"].mean == 0
    assert first.differences == {}
    assert later.measurements["avg_at_n"].mean == 1.0
    assert later.measurements["avg_at_n"].standard_error == 0.0
    change = later.differences["avg_at_n"]
    assert change.mean == 0.5
    assert change.standard_error == pytest.approx(np.std([0, 1], ddof=1) / np.sqrt(2))
    assert "step 5, math: avg@2 1.000 ± 0.000 (+0.500 ± 0.500)" in "\n".join(run.outlets.said)


async def test_held_out_numbers_are_paired_with_the_first(made):
    """Worked by hand: a is 1 above the mean 1 at first, and a quarter of the tokens; b is 1/3 below,
    and three quarters. So they add 1/4 and -1/4 to the error of the mean, and of a mean of 1/6 a
    sixth of that. The change of each is 5/24.
    """
    run = made("{every: 5, samples: 0}")
    for step in (0, 5):
        run.at(step)
        await run.evaluator.evaluate("during" if step else "before")

    first, later = read_evaluations(run.state.directory.evaluations)
    assert first.differences == {}
    assert later.by_prompt["reverse_kl"] == pytest.approx({"a": 1 / 3, "b": 1 / 9})
    change = later.differences["reverse_kl"]
    assert change.mean == pytest.approx(-5 / 6)
    assert change.standard_error == pytest.approx(5 / 12)
    assert later.prompts == 2
    said = run.outlets.said[-1]
    assert said.startswith("step 5, held out: reverse KL 0.167 ± 0.083 (-0.833 ± 0.417), in ")


async def test_a_run_that_goes_on_finds_its_first_measurement(made):
    evaluation = f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}"
    run = made(evaluation)
    for step in (0, 5):
        run.at(step)
        run.workers.says["b"] = "wrong"
        await run.evaluator.evaluate("during" if step else "before")
        await run.evaluator.beside.finish()

    await run.state.save(run.workers)
    run.state.end("failed")

    again = made(evaluation, resume="yes")
    again.at(10)
    again.workers.says["b"] = "right"
    await again.evaluator.evaluate("during")
    await again.evaluator.beside.finish()
    held_out, math = again.state.evaluations[-2:]
    assert held_out.differences["reverse_kl"].mean == pytest.approx(1 / 11 - 1)
    assert held_out.differences["reverse_kl"].standard_error == pytest.approx(0.5 * 10 / 11)
    assert math.differences["avg_at_n"].mean == 0.5


async def test_what_was_measured_is_in_the_next_row_once_and_shown_at_once(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    run.at(0)
    await run.evaluator.evaluate("before")
    await run.evaluator.beside.finish()
    row = run.evaluator.new_row()
    assert row['eopd_eval_avg_at_n_ratio{benchmark="math"}'] == 0.5
    assert row['eopd_eval_pass_at_k_ratio{benchmark="math",k="2"}'] == 0.5
    assert row['eopd_eval_step{evaluation="held_out"}'] == 0.0
    assert row["eopd_eval_reverse_kl_nats"] == 1.0
    assert row["eopd_eval_wait_seconds"] == 0.0
    assert run.outlets.shown.items() < row.items()
    assert run.evaluator.new_row() == {"eopd_eval_wait_seconds": 0.0}


async def test_what_is_given_up_is_measured_where_the_run_goes_on(made):
    run = made(
        f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}",
        checkpoint="{every: 50, keep_best: {metric: math/avg_at_n, mode: max}}",
    )
    run.at(5)
    assert run.state.is_due
    await run.state.save(run.workers)
    run.workers.free.clear()
    waiting = asyncio.create_task(run.evaluator.evaluate("during"))
    await asyncio.sleep(0)
    run.workers.free.set()
    await waiting
    run.workers.free.clear()
    assert run.evaluator.status() == "4 answers of benchmarks to be written"
    await run.evaluator.cancel()
    assert run.outlets.said[-1] == "the benchmarks under way were given up"
    assert run.evaluator.status() == "idle"
    assert lines(run) == [(5, "during", "held_out")]
    run.state.end("failed")

    again = made(
        f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}",
        resume="yes",
        checkpoint="{every: 50, keep_best: {metric: math/avg_at_n, mode: max}}",
    )
    again.at(5)
    await again.evaluator.evaluate("during")
    await again.evaluator.beside.finish()
    assert lines(again) == [(5, "during", "held_out"), (5, "during", "math")]
    assert again.state.progress.best.step == 5


async def test_what_other_weights_wrote_is_lost_and_counted(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    run.at(5)
    run.workers.free.clear()
    await asyncio.gather(run.evaluator.evaluate("during"), free_then_replace(run))
    await run.evaluator.beside.finish()
    (math,) = (one for one in run.state.evaluations if one.name == "math")
    assert math.measurements["lost"].mean == 4
    assert math.measurements["avg_at_n"].mean == 0
    assert "response_tokens" not in math.measurements


async def free_then_replace(run) -> None:
    """Lets the held-out responses be written, and then has an engine of other weights."""
    run.workers.free.set()
    while not run.evaluator.beside.left:
        await asyncio.sleep(0)

    run.workers.served = 6


async def test_a_benchmark_of_the_last_evaluation_is_known_before_the_next(made):
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    for step in (0, 5, 10):
        run.at(step)
        await run.evaluator.evaluate("during" if step else "before")

    await run.evaluator.beside.finish()
    assert [step for step, _, _ in lines(run)] == [0, 0, 5, 5, 10, 10]


@pytest.fixture
def grader(tmp_path, monkeypatch):
    """Writes the module of a user's grader; the name of the grader."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        (tmp_path / "my_grader.py").write_text(text)
        return "my_grader:grade"

    return write


async def test_a_grader_that_was_broken_meanwhile_costs_its_measurement_and_no_more(made, grader):
    name = grader("def grade(response, reference):\n    return True\n")
    mine = f"{{name: mine, data: m.jsonl, samples: 2, grader: '{name}'}}"
    run = made(f"{{every: 5, samples: 0, benchmarks: [{mine}, {MATH}]}}")
    grader("def grade(response, reference)\n")
    await run.evaluator.evaluate("before")
    await run.evaluator.beside.written()
    await run.evaluator.beside.finish()
    assert lines(run) == [(0, "before", "held_out"), (0, "before", "math")]
    (told,) = [text for text in run.outlets.said if "not measured" in text]
    assert told.startswith(
        "step 0, mine: not measured: evaluation.benchmarks.mine.grader: my_grader:grade: importing"
    )


@pytest.mark.parametrize("verdict", [Verdict.ERROR, Verdict.TIMEOUT])
async def test_an_error_and_a_time_out_are_no_grades(made, monkeypatch, verdict):
    grades = nullcontext(lambda response, reference: verdict)
    monkeypatch.setattr("eopd.runtime.evaluating.open_grader", lambda name, key: grades)
    run = made(f"{{every: 5, samples: 0, benchmarks: [{MATH}]}}")
    await run.evaluator.evaluate("before")
    await run.evaluator.beside.finish()
    (measured,) = [one for one in run.state.evaluations if one.name == "math"]
    assert measured.measurements["not_graded"].mean == 4


async def test_answers_that_were_not_graded_are_counted_and_said(made, grader):
    name = grader("def grade(response, reference):\n    raise KeyError('answer')\n")
    mine = f"{{name: mine, data: m.jsonl, samples: 2, grader: '{name}'}}"
    run = made(f"{{every: 5, samples: 0, benchmarks: [{mine}]}}")
    await run.evaluator.evaluate("before")
    await run.evaluator.beside.finish()
    (measured,) = [one for one in run.state.evaluations if one.name == "mine"]
    assert measured.measurements["not_graded"].mean == 4
    assert measured.measurements["avg_at_n"].mean == 0
    assert run.outlets.shown['eopd_eval_not_graded_trajectories{benchmark="mine"}'] == 4
    assert any("4 not graded, since the grader failed" in text for text in run.outlets.said)
