import asyncio
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import threading
import time

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.config import BenchmarkConfig, ConfigError
from eopd.config.benchmark import ks_of
from eopd.evaluation.benchmarks import before_stop, run_benchmark, sample_seed
from eopd.evaluation.diversity import distinct_ratio
from eopd.evaluation.passk import change_over_prompts, mean_over_prompts, pass_at_k
from eopd.evaluation.summary import by_prompt, differences, measurements
from eopd.rewards.exact import grade_exact
from eopd.rewards.final_answer import final_answer, last_boxed
from eopd.rewards.graders import open_grader
from eopd.rewards.spelling import (
    are_words_of_the_same_letters,
    stand_side_by_side,
    with_plain_numbers,
)
from eopd.rewards.verdict import Verdict
from eopd.types import (
    LostReason,
    LostTrajectory,
    RunFailedError,
    StopReason,
)

# --- pass@k and its standard error


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(
            n,
            c,
            k,
        ) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@given(n=st.integers(1, 3000), data=st.data())
def test_pass_at_k_equals_the_product_form_for_many_samples(n, data):
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    none_correct = 0.0 if n - c < k else math.prod(1 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(1 - none_correct, abs=1e-9)


def test_standard_error_is_clustered_by_prompt():
    """Against the sandwich formula over single samples: sqrt(sum over prompts of (sum of
    residuals)^2) / N, times the small-sample factor sqrt(G / (G - 1))."""
    correct = np.array(
        [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=float
    )
    groups, samples = correct.shape
    residual_sums = (correct - correct.mean()).sum(axis=1)
    sandwich = (
        math.sqrt((residual_sums**2).sum()) / (groups * samples) * math.sqrt(groups / (groups - 1))
    )
    estimate = mean_over_prompts(list(correct.mean(axis=1)))
    assert estimate.mean == pytest.approx(correct.mean())
    assert estimate.standard_error == pytest.approx(sandwich, rel=1e-12)
    naive = correct.std(ddof=1) / math.sqrt(correct.size)
    assert estimate.standard_error > 1.3 * naive


def test_prompts_weigh_by_their_tokens():
    """Worked by hand: 1 of two tokens and 4 of one are 2 a token, from which they are -2 and 2 in
    all, of three tokens: sqrt(2 * (4 / 9 + 4 / 9)).
    """
    found = mean_over_prompts([1.0, 4.0], [2.0, 1.0])
    assert found.mean == pytest.approx(2.0)
    assert found.standard_error == pytest.approx(4 / 3)
    assert mean_over_prompts([1.0, 4.0, 9.0], [2.0, 1.0, 0.0]).mean == pytest.approx(2.0)


def test_a_change_of_means_per_token_is_paired():
    """Worked by hand: the means are 2 and 1.25. Their prompts add -2/3 and 2/3 to the error of the
    first, and 3/16 and -3/16 to that of the second, whose differences are 41/48 and -41/48.
    """
    found = change_over_prompts([2.0, 1.0], [1.0, 4.0], [1.0, 3.0], [2.0, 1.0])
    assert found.mean == pytest.approx(-0.75)
    assert found.standard_error == pytest.approx(2 * 41 / 48)


def test_the_error_of_a_change_is_the_spread_of_many_measurements():
    """Prompts are drawn again and again; how hard one is, and how long, is in both measurements."""
    rng = np.random.default_rng(0)
    shape = (2000, 60)
    hard, length = rng.gamma(2.0, 1.0, shape), rng.integers(5, 40, shape)
    before = hard + rng.normal(0.0, 0.2, shape)
    tokens, tokens_before = (
        length
        + rng.integers(
            0,
            5,
            shape,
        ),
        length + rng.integers(0, 5, shape),
    )
    after = 0.8 * hard + rng.normal(0.0, 0.2, shape)
    found = [
        change_over_prompts(*map(np.ndarray.tolist, columns))
        for columns in zip(after, before, tokens, tokens_before, strict=True)
    ]
    spread = np.std([one.mean for one in found], ddof=1)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.05)
    alone = [mean_over_prompts(list(row)).standard_error for row in before]
    assert spread < 0.5 * np.mean(alone)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (9, [1, 2, 4, 8, 9])]
)
def test_pass_at_k_is_reported_for_powers_of_two_and_n(n, ks):
    assert list(ks_of(n)) == ks


def test_one_prompt_has_no_standard_error():
    assert mean_over_prompts([0.5]).standard_error is None
    assert change_over_prompts([0.5], [0.25]).standard_error is None


# --- graders


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{1} then \boxed{2 and the limit", "1"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"} { \boxed {7} }", "7"),
        (r"\boxed{}", ""),
        (r"Hence \fbox{5}.", "5"),
        (r"\boxed 5", "5"),
        (r"so $\boxed5$, that is", "5"),
        (r"\boxed{1}, no: $\boxed -2\frac{1}{3}$", r"-2\frac{1}{3}"),
        (r"$\boxed\frac{\sqrt{2}}{2}$", r"\frac{\sqrt{2}}{2}"),
        (r"\boxed A$", "A"),
        (r"write it in a \boxed manner", None),
        (r"\boxed{7}, as \boxedfoo{8}", "7"),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_of_a_runaway_response_takes_one_pass():
    assert last_boxed(r"\boxed{" * 200_000) is None  # quadratic work would take minutes
    assert last_boxed(r"\boxed 1{" * 100_000) == "1"
    assert last_boxed(r"\boxed " + "{" * 200_000) is None
    assert grade_exact("." * 200_000 + "x" + "*`" * 200_000, "5") is Verdict.WRONG


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24\n24 + 48 = 72\n#### 72", "72"),
        ("#### 72\n", "72"),
        ("#### 1\nno\n  #### 2", "2"),
        ("#### Step 4\nadd them", None),  # a heading, not the end
        ("##### 72", None),
        (r"\boxed{5}" + "\n#### 72", "5"),
        ("72", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = <<48+24=72>>72 "
    "clips.\n#### 72"
)


@pytest.mark.parametrize(
    ("response", "reference", "verdict"),
    [
        ("I think\n  Paris. \n", "paris", Verdict.CORRECT),
        (r"Thus \boxed{Paris}, as Lyon is not.", "Paris", Verdict.CORRECT),
        ("$42$.", r"the box holds \boxed{42}", Verdict.CORRECT),
        ("\uff14\uff12", "42", Verdict.CORRECT),  # full-width digits
        ("new   york", "New York", Verdict.CORRECT),
        ("Paris is the capital", "Paris", Verdict.WRONG),
        (".5", "5", Verdict.WRONG),
        ("1/2", "0.5", Verdict.WRONG),
        (" \n ", "5", Verdict.NO_ANSWER),
        (r"5, so \boxed{ }", "5", Verdict.NO_ANSWER),
        (r"\boxed{72}", GSM8K, Verdict.CORRECT),
        (r"\boxed{24}", GSM8K, Verdict.WRONG),
        (r"\boxed{**5**}", "5", Verdict.CORRECT),
        (r"It is **\(5\)**", r"It is **\(5\)**.", Verdict.CORRECT),
        (r"\boxed{\text{Paris}}", "paris", Verdict.CORRECT),
        ("\u22125", "-5", Verdict.CORRECT),  # the sign of minus
        ("\u0664\u0662", "42", Verdict.CORRECT),  # Arabic digits
        ("10\u00b2", "102", Verdict.WRONG),  # a square is no digit
        ("10\u00b2", "10\u00b2", Verdict.CORRECT),
        ("\u00bd", "1/2", Verdict.WRONG),
        ("\u2460", "1", Verdict.WRONG),  # 1 in a circle
        ("H\u2082O", "H2O", Verdict.WRONG),
        ("e\u0301te\u0301", "\u00e9t\u00e9", Verdict.CORRECT),
        ("*a* and *b*", "a* and *b", Verdict.WRONG),
        ("**$5$.**", "$$5$$", Verdict.CORRECT),
        ("lyon", ("Paris", "Lyon"), Verdict.CORRECT),
        ("Nice", ("Paris", "Lyon"), Verdict.WRONG),
        ("Nice", "", Verdict.ERROR),  # nothing to compare with
        ("Nice", (" ", "Nice"), Verdict.CORRECT),
    ],
)
def test_exact_grader(response, reference, verdict):
    assert grade_exact(response, reference) is verdict


@pytest.fixture(scope="module")
def math_grader():
    with open_grader("math", time_limit_s=1.0) as grade:
        grade(r"\boxed{(x+1)^2}", "x^2+2x+1")  # sympy's first comparisons are slow
        yield grade


@pytest.mark.parametrize(
    ("response", "reference", "verdict"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", Verdict.CORRECT),
        (r"\boxed{1/2}", r"from \boxed{3} follows \boxed{0.5}", Verdict.CORRECT),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", Verdict.CORRECT),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", Verdict.CORRECT),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", Verdict.CORRECT),
        (r"first \boxed{3}, then \boxed{4}", "4", Verdict.CORRECT),
        (r"\boxed{\text{Monday}}", "Monday", Verdict.CORRECT),
        (r"first \boxed{3}, then \boxed{4}", "3", Verdict.WRONG),
        (r"\boxed{3}", r"3\sqrt{13}", Verdict.WRONG),  # a bare reference is read whole
        ("the answer is 4", "4", Verdict.NO_ANSWER),
        (r"\boxed{}", "4", Verdict.NO_ANSWER),
        (r"\boxed{4}", "", Verdict.ERROR),  # no reference to compare with
        (r"\boxed{4}", "$$", Verdict.ERROR),
        (r"\boxed{72}", GSM8K.removesuffix("#### 72"), Verdict.ERROR),  # prose is no answer
        (r"\boxed{72}", "He sold half as many clips in May.", Verdict.ERROR),
        (
            r"\boxed{\text{all numbers that are larger than } 2}",
            r"\text{all numbers that are larger than } 2",
            Verdict.CORRECT,
        ),
        (
            r"\boxed{\frac{\sqrt{2}\cos x\sin y}{\log z\tan w}}",
            r"\frac{\sqrt{2}\cos x\sin y}{\log z\tan w}",
            Verdict.CORRECT,
        ),
        (r"So it is \boxed{72}.", GSM8K, Verdict.CORRECT),
        (r"\boxed{24}", GSM8K, Verdict.WRONG),
        ("Together\n#### 72", "72", Verdict.CORRECT),
        (r"\fbox{5}", "5", Verdict.CORRECT),
        (r"\boxed{5}", r"Hence \fbox{5}.", Verdict.CORRECT),
        (r"\boxed 5", "5", Verdict.CORRECT),
        (r"$\boxed5$", "5", Verdict.CORRECT),
        ("\\boxed{\uff15}", "5", Verdict.CORRECT),
        (r"\boxed{**5**}", "5", Verdict.CORRECT),
        ("\\boxed{\u22125}", "-5", Verdict.CORRECT),
        ("\\boxed{10\u00b2}", "100", Verdict.CORRECT),
        ("\\boxed{10\u00b2}", "102", Verdict.WRONG),
        ("\\boxed{10\u207b\u00b2}", "0.01", Verdict.CORRECT),
        ("\\boxed{2\u00bd}", "2.5", Verdict.CORRECT),
        ("\\boxed{\u00bd}", "12", Verdict.WRONG),
        (r"\boxed{0.5}", ("3", r"\frac{1}{2}"), Verdict.CORRECT),
        (r"\boxed{0.5}", ("3", "4"), Verdict.WRONG),
        (r"\boxed{New York}", "new york", Verdict.CORRECT),
        (r"\boxed{5\$}", "5", Verdict.CORRECT),
        (r"\boxed{$x^2$}", r"\(x \cdot x\)", Verdict.CORRECT),
        (r"\boxed{\left. x^2 \right.}", r"\left. x^2 \right.", Verdict.CORRECT),
        (r"\boxed{1000}", "1 000", Verdict.CORRECT),
        (r"\boxed{0}", "1 000", Verdict.WRONG),
        (r"\boxed{12345}", "12\u2009345", Verdict.CORRECT),
        (r"\boxed{12345}", "12\u00a0345", Verdict.CORRECT),
        (r"\boxed{12345}", r"12\,345", Verdict.CORRECT),
        (r"\boxed{4140}", r"12\ 345", Verdict.WRONG),
        (r"\boxed{12\,345.5}", "12 345.5", Verdict.CORRECT),
        (r"\boxed{-10 000 000}", "-10000000", Verdict.CORRECT),
        (r"\boxed{1{,}000}", "1 000 km", Verdict.CORRECT),
        (r"\boxed{0.001}", "1e-3", Verdict.CORRECT),
        (r"\boxed{-3}", "1e-3", Verdict.WRONG),
        (r"\boxed{2.5E4}", "25000", Verdict.CORRECT),
        (r"\boxed{90}", "90\u00b0", Verdict.CORRECT),
        (r"\boxed{90}", r"90^\circ", Verdict.CORRECT),
        (r"\boxed{90^{\circ}}", "90 degrees", Verdict.CORRECT),
        (r"\boxed{91^\circ}", "90\u00b0", Verdict.WRONG),
        (r"\boxed{25}", r"25^\circ\text{C}", Verdict.CORRECT),
        (r"\boxed{3.5}", "3 1/2", Verdict.CORRECT),
        (r"\boxed{-3.5}", "-3 1/2", Verdict.CORRECT),
        (r"\boxed{1.5}", "3 1/2", Verdict.WRONG),
        (r"\boxed{\frac 1 2}", r"\frac 1 2", Verdict.CORRECT),
        (r"\boxed{3}", r"\log_2 8", Verdict.CORRECT),
        (r"\boxed{408}", "12 34", Verdict.ERROR),
        (r"\boxed{1}", r"30^\circ 15'", Verdict.ERROR),
        (r"\boxed{12 34}", "408", Verdict.NO_ANSWER),
        (r"\boxed{silent}", "listen", Verdict.WRONG),
        (r"\boxed{\text{Pairs}}", "Paris", Verdict.WRONG),
        (r"\boxed{\text{seat}}", r"\text{east}", Verdict.WRONG),
        (r"\boxed{Listen}", "listen", Verdict.CORRECT),
        (r"\boxed{cab}", "abc", Verdict.CORRECT),
        (r"\boxed{yx}", "xy", Verdict.CORRECT),
    ],
)
def test_math_grader(math_grader, response, reference, verdict):
    assert math_grader(response, reference) is verdict


def test_a_runaway_answer_is_spelt_in_one_pass():
    for text in (
        " " * 100_000 + "x",
        "1" * 100_000,
        "1 " * 50_000,
        "a " * 50_000,
        "1 000 " * 20_000,
    ):
        begin = time.process_time()
        with_plain_numbers(text)
        stand_side_by_side(text)
        are_words_of_the_same_letters(text, text[::-1])
        assert time.process_time() - begin < 1.0


def test_math_grader_survives_an_endless_comparison_in_a_thread(math_grader):
    verdicts = []

    def judge():
        verdicts.append(math_grader(r"\boxed{10^{10^{10}}}", "3"))
        verdicts.append(math_grader(r"\boxed{3}", "3"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert verdicts == [Verdict.TIMEOUT, Verdict.CORRECT]


def test_math_grader_names_a_dead_process_an_error_and_goes_on(monkeypatch):
    started, start = [], subprocess.Popen

    def start_and_note(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_note)
    with open_grader("math") as grade:
        assert grade(r"\boxed{1}", "1") is Verdict.CORRECT
        os.kill(started[0].pid, signal.SIGKILL)
        started[0].wait()
        assert grade(r"\boxed{1}", "1") is Verdict.ERROR
        assert grade(r"\boxed{1}", "1") is Verdict.CORRECT

    assert [process.returncode for process in started] == [-signal.SIGKILL, 0]


def test_unknown_grader_is_named():
    with (
        pytest.raises(ConfigError, match=r"package.module:name, .*'maths'"),
        open_grader("maths"),
    ):
        pass


# --- the benchmark


def prompt_sample(prompt_id, answer="7"):
    return fakes.prompt(prompt_id, [1, 2], source="maths", answer=answer)


class ScriptedEngine:
    """Answers from a script: (prompt id, sample index) -> response ids, or None for a loss."""

    def __init__(self, script):
        self.script = script
        self.calls = []

    async def generate(self, prompt, sample_index, sampling):
        self.calls.append((prompt.prompt_id, sample_index, sampling))
        await asyncio.sleep(0)
        ids = self.script[prompt.prompt_id, sample_index]
        if ids is None:
            return fakes.lost(prompt, sample_index, detail="engine died")

        reason = StopReason.LENGTH if len(ids) == sampling.max_tokens else StopReason.END_TOKEN

        return fakes.stored(
            fakes.trajectory(ids, of=prompt, sample_index=sample_index, stop=reason)
        )


async def fetch(stored):
    await asyncio.sleep(0)
    return stored.body


def decode(ids):
    return " ".join(str(token) for token in ids)


async def benchmark(engines, prompts, grader=grade_exact, *, fetch=fetch, **changes):
    config = BenchmarkConfig(**{"name": "b", "data": "b.jsonl", "samples": 4} | changes)
    return await run_benchmark(
        engines,
        prompts,
        decode,
        grader,
        config,
        fetch=fetch,
        seed=5,
        max_tokens=3,
    )


SCRIPT = {
    ("a", 0): [7],
    ("a", 1): [7],
    ("a", 2): [8, 8, 8],
    ("a", 3): None,
    ("b", 0): [9],
    ("b", 1): [9, 9],
    ("b", 2): None,
    ("b", 3): [9, 9, 9],
}


async def test_result_counts_lost_samples_as_unanswered():
    result = await benchmark(ScriptedEngine(SCRIPT), [prompt_sample("a"), prompt_sample("b")])
    assert [prompt.num_correct for prompt in result.prompts] == [2, 0]
    assert [prompt.num_samples for prompt in result.prompts] == [4, 4]
    found = measurements(by_prompt(result, (1, 2, 4)))
    assert found["avg_at_n"].mean == pytest.approx(2 / 8)
    assert found["avg_at_n"].standard_error == pytest.approx(
        statistics.stdev([0.5, 0.0]) / math.sqrt(2)
    )
    assert {k: found[f"pass_at_{k}"].mean for k in (1, 2, 4)} == pytest.approx(
        {1: 0.25, 2: (5 / 6) / 2, 4: 0.5}
    )
    assert result.num_lost == 2
    assert result.num_verdicts == {
        Verdict.CORRECT: 2,
        Verdict.WRONG: 4,
        Verdict.NO_ANSWER: 0,
        Verdict.TIMEOUT: 0,
        Verdict.ERROR: 0,
    }
    lengths = (1 + 1 + 3) / 3, (1 + 2 + 3) / 3
    assert found["response_tokens"].mean == pytest.approx(sum(lengths) / 2)
    assert found["truncation_rate"].mean == pytest.approx(1 / 3)


async def test_rows_are_json_lines(tmp_path):
    result = await benchmark(ScriptedEngine(SCRIPT), [prompt_sample("a"), prompt_sample("b")])
    result.write_prompts(tmp_path / "prompts.jsonl")
    rows = [
        json.loads(line)
        for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["prompt_id"] for row in rows] == ["a", "b"]
    assert rows[0]["reference_answer"] == "7"
    assert rows[0]["num_samples"] == 4
    assert rows[0]["num_correct"] == 2
    assert rows[0]["answers"][2] == {
        "sample_index": 2,
        "response": "8 8 8",
        "num_response_tokens": 3,
        "stop_reason": "length",
        "verdict": "wrong",
    }
    assert rows[0]["lost"] == [
        {"sample_index": 3, "reason": "rollout_failed", "detail": "engine died"}
    ]


async def test_all_samples_are_asked_for_at_once():
    """No answer comes before every sample has been asked for: a benchmark that waits for answers
    would hang.
    """
    prompts = [prompt_sample(name) for name in "abc"]
    everybody = asyncio.Event()
    engine = ScriptedEngine({(prompt.prompt_id, i): [7] for prompt in prompts for i in range(5)})

    class Gate:
        async def generate(self, prompt, sample_index, sampling):
            answer = await engine.generate(prompt, sample_index, sampling)
            if len(engine.calls) == 15:
                everybody.set()

            await everybody.wait()
            return answer

    async with asyncio.timeout(5):
        result = await benchmark(Gate(), prompts, samples=5)

    assert sorted(call[:2] for call in engine.calls) == sorted(itertools.product("abc", range(5)))
    assert [prompt.num_correct for prompt in result.prompts] == [5, 5, 5]


async def test_seeds_are_fixed_per_sample():
    prompts = [prompt_sample(name) for name in "ab"]
    seeds = []

    for order in (prompts, prompts[::-1]):
        engine = ScriptedEngine(SCRIPT)
        await benchmark(engine, order)
        seeds.append({call[:2]: call[2].seed for call in engine.calls})

    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == 8
    assert all(0 <= seed < 2**63 for seed in seeds[0].values())
    assert sample_seed(5, "a", 0) == seeds[0]["a", 0] != sample_seed(6, "a", 0)


async def test_samples_go_before_those_of_training_the_first_prompt_first():
    engine = ScriptedEngine(SCRIPT)
    await benchmark(engine, [prompt_sample("b"), prompt_sample("a")])
    priorities = {call[:2]: call[2].priority for call in engine.calls}
    assert [priorities["b", index] for index in range(4)] == [-8, -7, -6, -5]
    assert [priorities["a", index] for index in range(4)] == [-4, -3, -2, -1]


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("12 # no", ("#",), "12 "),
        ("12 # no\n", ("\n", " #"), "12"),
        ("12", ("#",), "12"),
        ("12", (), "12"),
        ("#", ("#",), ""),
    ],
)
def test_what_is_graded_ends_before_a_text_that_ends_a_response(text, stop, before):
    assert before_stop(text, stop) == before


async def test_a_benchmark_grades_what_stands_before_its_stop():
    engine = ScriptedEngine({("a", 0): [7, 8]})
    result = await benchmark(
        engine,
        [prompt_sample("a")],
        samples=1,
        stop=(" 8",),
        top_p=0.5,
        temperature=0.7,
    )
    (prompt,) = result.prompts
    assert prompt.answers[0].response == "7"
    assert prompt.answers[0].num_response_tokens == 2
    assert prompt.num_correct == 1
    asked = engine.calls[0][2]
    assert (asked.top_p, asked.temperature, asked.stop, asked.max_tokens) == (0.5, 0.7, (" 8",), 3)


# --- what a benchmark says of every prompt


@pytest.mark.parametrize(
    ("responses", "n", "ratio"),
    [
        ([[1, 2, 1], [1, 2]], 1, 2 / 5),
        ([[1, 2, 1], [1, 2]], 2, 2 / 3),
        ([[4, 4, 4, 4]], 2, 1 / 3),
        ([[1, 2], [3, 4]], 2, 1.0),
        ([[1], [2]], 2, math.nan),
    ],
)
def test_distinct_ratio(responses, n, ratio):
    assert distinct_ratio(responses, n) == pytest.approx(ratio, nan_ok=True)


async def measured(script, names="ab"):
    prompts = [prompt_sample(name) for name in names]
    return by_prompt(await benchmark(ScriptedEngine(script), prompts), (2, 4))


async def test_a_benchmark_is_summed_up_prompt_by_prompt():
    numbers = await measured(SCRIPT)
    assert numbers["avg_at_n"] == {"a": 0.5, "b": 0.0}
    assert numbers["pass_at_2"] == {"a": pytest.approx(5 / 6), "b": 0.0}  # 1 - 1 / 6
    assert numbers["pass_at_4"] == {"a": 1.0, "b": 0.0}
    assert "pass_at_1" not in numbers, "it was not asked for"
    assert numbers["response_tokens"] == pytest.approx({"a": 5 / 3, "b": 2.0})
    assert numbers["truncation_rate"] == pytest.approx({"a": 1 / 3, "b": 1 / 3})
    assert numbers["distinct_1"] == pytest.approx({"a": 2 / 5, "b": 1 / 6})
    assert numbers["distinct_2"] == pytest.approx({"a": 1 / 2, "b": 1 / 3})

    found = measurements(numbers)["avg_at_n"]
    assert found.mean == 0.25
    assert found.standard_error == pytest.approx(statistics.stdev([0.5, 0.0]) / math.sqrt(2))


async def test_a_prompt_without_any_answer_scores_0_and_has_no_length():
    numbers = await measured({**SCRIPT, **{("b", index): None for index in range(4)}})
    assert numbers["avg_at_n"] == {"a": 0.5, "b": 0.0}
    assert numbers["response_tokens"] == pytest.approx({"a": 5 / 3})
    assert measurements(numbers)["response_tokens"].standard_error is None


async def test_changes_are_paired_by_prompt():
    """A paired standard error is that of the differences, far below that of each measurement."""
    first = {"avg_at_n": {"a": 0.1, "b": 0.5, "c": 0.9}, "distinct_1": {"a": 0.5}}
    later = {"avg_at_n": {"c": 0.95, "a": 0.2, "b": 0.55}, "distinct_1": {"a": 0.5, "b": 0.1}}
    change = differences(later, first)
    assert set(change) == {"avg_at_n"}, "of other prompts nothing can be paired"
    assert change["avg_at_n"].mean == pytest.approx(0.2 / 3)
    spread = statistics.stdev([0.1, 0.05, 0.05]) / math.sqrt(3)
    assert change["avg_at_n"].standard_error == pytest.approx(spread)
    assert differences(later, {}) == {}


def test_parts_of_the_tokens_weigh_by_their_tokens():
    """Worked by hand: of 4 tokens 1 is of the part, a prompt of which has none."""
    first = {
        "reverse_kl": {"a": 2.0, "b": 4.0},
        "tokens": {"a": 3.0, "b": 1.0},
        "reverse_kl: teacher unsure": {"a": 6.0, "b": 0.0},
        "tokens: teacher unsure": {"a": 1.0, "b": 0.0},
    }
    found = measurements(first)
    assert list(found) == ["reverse_kl", "reverse_kl: teacher unsure", "share: teacher unsure"]
    assert found["reverse_kl"].mean == pytest.approx(2.5)
    assert found["reverse_kl: teacher unsure"].mean == pytest.approx(6.0)
    assert found["share: teacher unsure"].mean == 0.25
    assert found["share: teacher unsure"].standard_error is None

    later = {
        "reverse_kl": {"b": 1.0, "a": 2.0},
        "tokens": {"b": 1.0, "a": 1.0},
        "reverse_kl: teacher unsure": {"b": 1.0, "a": 5.0},
        "tokens: teacher unsure": {"b": 1.0, "a": 1.0},
    }
    changes = differences(later, first)
    assert list(changes) == ["reverse_kl", "reverse_kl: teacher unsure"]
    # a adds 1/4 * 3 * -0.5 = -3/8 at first and 1/2 * 0.5 = 1/4 then, b the opposite
    assert changes["reverse_kl"].mean == pytest.approx(-1.0)
    assert changes["reverse_kl"].standard_error == pytest.approx(2 * 5 / 8)
    # the part of the first has no spread; a adds 1/2 * 2 = 1 then, b the opposite
    assert changes["reverse_kl: teacher unsure"].mean == pytest.approx(-3.0)
    assert changes["reverse_kl: teacher unsure"].standard_error == pytest.approx(2.0)


async def test_a_body_lost_before_it_is_fetched_is_a_loss():
    async def fetch_none(stored):
        return LostTrajectory(
            key=stored.header.key,
            reason=LostReason.ROLLOUT_FAILED,
            detail="node lost",
        )

    result = await benchmark(
        ScriptedEngine(SCRIPT),
        [prompt_sample("a")],
        fetch=fetch_none,
    )
    assert result.num_lost == 4
    assert set(by_prompt(result, (4,))) == {"avg_at_n", "pass_at_4"}, "and no length"


async def test_answers_are_graded_one_at_a_time_while_the_loop_goes_on():
    running = 0
    most = 0
    loop_thread = threading.get_ident()
    threads = set()

    def grade(response, reference):
        nonlocal running, most
        running += 1
        most = max(most, running)
        threads.add(threading.get_ident())
        time.sleep(0.005)
        running -= 1
        return Verdict.TIMEOUT

    result = await benchmark(
        ScriptedEngine(SCRIPT),
        [prompt_sample("a"), prompt_sample("b")],
        grade,
    )
    assert most == 1
    assert len(threads) == 1
    assert loop_thread not in threads
    assert result.num_verdicts[Verdict.TIMEOUT] == 6
    assert [prompt.num_correct for prompt in result.prompts] == [0, 0]


async def test_a_grader_that_is_busy_does_not_hold_up_who_cancels_the_benchmark():
    began, release = threading.Event(), threading.Event()

    def grade(response, reference):
        began.set()
        release.wait(10.0)
        return Verdict.CORRECT

    task = asyncio.create_task(benchmark(ScriptedEngine(SCRIPT), [prompt_sample("a")], grade))
    while not began.is_set():
        await asyncio.sleep(0.01)

    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_engine_that_raises_ends_the_benchmark():
    with pytest.raises(ExceptionGroup) as caught:
        await benchmark(ScriptedEngine({}), [prompt_sample("a")])

    assert caught.group_contains(KeyError)


async def test_of_engines_that_are_all_lost_one_failure_is_told():
    class Lost:
        async def generate(self, *arguments):
            raise RunFailedError("no engine is left")

    with pytest.raises(RunFailedError, match="no engine is left"):
        await benchmark(Lost(), [prompt_sample("a")])


async def test_a_benchmark_that_cannot_be_graded_has_no_number(monkeypatch):
    def full(*arguments, **options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with (
        open_grader("math") as grade,
        pytest.raises(ConfigError, match=r"cannot be started: \[Errno 11\]"),
    ):
        await benchmark(
            ScriptedEngine(SCRIPT),
            [prompt_sample("a")],
            lambda response, reference: grade(r"\boxed{7}", reference),
        )
