"""Rewards and filters: what becomes of what a function says, or does not say."""

import os
import signal
import subprocess
import sys
import time

import fakes
import numpy as np
import psutil
import pytest

from eopd.config import ConfigError
from eopd.config.loss import Reward
from eopd.config.sections import FilterConfig
from eopd.plugins import RewardFunction
from eopd.rewards import process
from eopd.rewards.filtering import Filter
from eopd.rewards.process import Asked, Failed, FunctionPool, FunctionProcess, Returned
from eopd.rewards.verifier import Verifier, _Grading
from eopd.tokenizer import load_tokenizer
from eopd.types import (
    Exact,
    Header,
    LostReason,
    LostTrajectory,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

FUNCTIONS = """
import asyncio, os, sys, time
import numpy as np

def score(row, response, response_ids, *, scale=1.0):
    print("what a function prints is no reply")
    return np.float32(scale * sum(word in response for word in row["words"]) / len(row["words"]))

async def later(row, response, response_ids):
    await asyncio.sleep(0.01)
    return len(response_ids)

def path(row, response, response_ids):
    return str(os.getpid())

def odd(row, response, response_ids):
    case = row["case"]
    if case == "raises":
        raise LookupError("no such key")
    if case == "exits":
        sys.exit(3)
    if case == "dies":
        os._exit(5)
    if case == "spins":
        while True:
            pass
    if case == "sleeps":
        time.sleep(60)
    if case == "closes":
        os.closerange(3, 64)
        time.sleep(60)
    odd = {"nan": float("nan"), "text": "high", "none": None, "list": [1.0]}
    return {"huge": 10**5000, "enormous": 1e300, "large": -(10**400), **odd}[case]

def keep(scored, *, nats):
    if scored.row["case"] == "raises":
        raise LookupError("no such key")
    if scored.row["case"] == "number":
        return 1
    assert scored.response == "24" and scored.stop_reason == "length" and scored.reward == 0.5
    assert scored.response_ids.dtype == np.int32 and scored.loss_mask.all()
    return bool(scored.teacher_logprobs.mean() > -nats and scored.teacher_entropy.max() < 1.0)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A working directory that holds the functions above."""
    (tmp_path / "made_up_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "made_up_functions:"


@pytest.fixture
def model(tiny_model):
    return tiny_model("qwen3", seed=1)


def answered(model, text: str, row: dict[str, object] | None) -> Trajectory:
    ids = load_tokenizer(model).encode(text, add_special_tokens=False)
    return fakes.trajectory(ids, of=fakes.prompt(row=row), stop=StopReason.LENGTH)


async def rewarded(verifier: Verifier, trajectory: Trajectory) -> Header:
    return await verifier.reward(Header.of(trajectory, {}), trajectory)


async def test_our_graders_reward_with_one_or_nought_and_only_what_has_a_row(model):
    verifier = Verifier(Reward(function="exact"), model)

    try:
        row = {"answer": "24"}
        right = await rewarded(verifier, answered(model, "so it is\n24", row))
        wrong = await rewarded(verifier, answered(model, "so it is\n25", row))
        measured = await rewarded(verifier, answered(model, "24", None))
    finally:
        verifier.close()

    assert [header.reward for header in (right, wrong, measured)] == [1.0, 0.0, None]
    assert measured.reward_fault is None


async def test_a_function_gives_any_number(functions, model):
    verifier = Verifier(Reward(function=functions + "score", options={"scale": 0.5}), model)

    try:
        header = await rewarded(
            verifier,
            answered(
                model,
                "a b",
                {"words": ["a", "b", "x", "y"]},
            ),
        )
    finally:
        verifier.close()

    assert (header.reward, header.reward_fault) == (0.25, None)


async def test_a_coroutine_function_is_awaited(functions, model):
    verifier = Verifier(Reward(function=functions + "later"), model)

    try:
        headers = [
            await rewarded(
                verifier,
                answered(
                    model,
                    "1 2 3",
                    {},
                ),
            )
            for _ in range(2)
        ]
    finally:
        verifier.close()

    assert headers[0].reward == headers[1].reward == headers[0].num_response_tokens


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("raises", "raised LookupError: no such key ("),
        ("exits", "raised SystemExit: 3"),
        ("dies", "its process ended with code 5"),
        ("nan", "returned nan, which is no finite number"),
        ("text", "returned 'high', which is no finite number"),
        ("none", "returned None, which is no finite number"),
        ("list", "returned list"),
        ("huge", "returned a whole number beyond all others that are finite"),
        ("enormous", "returned 1e+300; a reward is at most 1e+09 in size"),
        ("large", "returned a whole number beyond all others that are finite"),
    ],
)
async def test_a_function_without_a_number_gives_a_named_fault(functions, model, case, words):
    verifier = Verifier(Reward(function=functions + "odd"), model)

    try:
        header = await rewarded(verifier, answered(model, "24", {"case": case}))
    finally:
        verifier.close()

    assert header.reward is None
    assert header.reward_fault.startswith("made_up_functions:odd: ")
    assert words in header.reward_fault


@pytest.mark.parametrize(
    ("case", "limits", "words"),
    [
        ("spins", {"cpu_limit_s": 0.3}, "used more than 0.3 s of CPU"),
        ("sleeps", {"clock_limit_s": 3.0}, "did not return within 3 s"),
    ],
)
def test_a_limit_ends_the_call_and_the_next_one_is_answered(functions, case, limits, words):
    asked = Asked(key="k", function=functions + "odd", kind=RewardFunction, **limits)
    child = FunctionProcess(asked)

    said = child.ask({"case": case}, "", [])
    after = child.ask({"case": "text"}, "", [])
    child.close()

    assert said == Failed(f"made_up_functions:odd: {words}", timed_out=True)
    assert after == Returned("high")


def test_a_child_that_reads_no_question_is_ended(functions):
    asked = Asked(key="k", function=functions + "odd", kind=RewardFunction, clock_limit_s=3.0)
    child = FunctionProcess(asked)
    child.start()
    os.kill(child._process.pid, signal.SIGSTOP)

    said = child.ask({"case": "text", "more": "x" * 2**21}, "", [])
    after = child.ask({"case": "text", "more": "x" * 2**21}, "", [])
    child.close()

    words = "did not return within 3 s"
    assert said == Failed(f"made_up_functions:odd: {words}", timed_out=True)
    assert after == Returned("high")


def test_a_function_that_closes_its_pipes_and_goes_on_is_ended(functions, monkeypatch):
    monkeypatch.setattr(process, "_CLOSE_S", 0.2)
    child = FunctionProcess(Asked(key="k", function=functions + "odd", kind=RewardFunction))

    said = child.ask({"case": "closes"}, "", [])
    after = child.ask({"case": "text"}, "", [])
    child.close()

    assert said == Failed("made_up_functions:odd: its process ended with code -9")
    assert after == Returned("high")


async def test_an_answer_that_no_process_can_grade_has_no_reward(monkeypatch):
    def full(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", full)
    grading = _Grading(Reward(function="math"))
    said = await grading.ask({"answer": "5"}, r"\boxed{5}", [])
    grading.close()
    assert isinstance(said, Failed) and "cannot be started: [Errno 24] Too many" in said.cause


async def test_a_pool_that_can_start_no_further_process_says_so(functions, monkeypatch):
    def full(*arguments, **options):
        raise OSError(24, "Too many open files")

    pool = FunctionPool(Asked(key="k", function=functions + "odd", kind=RewardFunction))
    pool._idle.clear()
    monkeypatch.setattr(subprocess, "Popen", full)
    said = await pool.ask({"case": "text"}, "", [])
    pool.close()
    assert isinstance(said, Failed) and "cannot be started: [Errno 24] Too many" in said.cause


def test_a_machine_that_starts_no_process_is_told(functions, monkeypatch):
    def full(*arguments, **options):
        raise OSError(24, "Too many open files")

    child = FunctionProcess(Asked(key="k", function=functions + "odd", kind=RewardFunction))
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", full)
        with pytest.raises(ConfigError, match=r"cannot be started: \[Errno 24\] Too many"):
            child.ask({"case": "text"}, "", [])

    assert child.ask({"case": "text"}, "", []) == Returned("high")
    child.close()


def test_a_function_does_not_outlive_a_parent_that_was_killed(functions):
    program = (
        "import os, signal, threading, time\n"
        "from eopd.plugins import RewardFunction\n"
        "from eopd.rewards.process import Asked, FunctionProcess\n"
        f"asked = Asked(key='k', function='{functions}odd', kind=RewardFunction)\n"
        "child = FunctionProcess(asked)\n"
        "child.start()\n"
        "print(child._process.pid, flush=True)\n"
        "threading.Thread(target=child.ask, args=({'case': 'sleeps'}, '', [])).start()\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # the child has stderr too
    ended = subprocess.run([sys.executable, "-c", program], text=True, **pipes)
    child = int(ended.stdout)

    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            return

        time.sleep(0.1)

    pytest.fail("it still runs")


def test_a_function_that_is_not_found_in_the_child_is_a_mistake(functions):
    asked = Asked(key="k", function=functions + "nothing", kind=RewardFunction)

    with pytest.raises(ConfigError, match="k: made_up_functions:nothing: there is no 'nothing'"):
        FunctionProcess(asked).start()


def test_a_function_that_is_gone_when_its_child_must_start_again_is_told(functions, tmp_path):
    child = FunctionProcess(
        Asked(
            key="k",
            function=functions + "odd",
            kind=RewardFunction,
        )
    )
    child.start()
    (tmp_path / "made_up_functions.py").unlink()

    died = child.ask({"case": "dies"}, "", [])
    assert died == Failed("made_up_functions:odd: its process ended with code 5")
    with pytest.raises(ConfigError, match="there is no module made_up_functions"):
        child.ask({"case": "text"}, "", [])

    child.close()


async def test_calls_side_by_side_have_processes_of_their_own_which_end(functions, monkeypatch):
    import asyncio

    monkeypatch.setattr(process, "SIDE_BY_SIDE", 2)
    pool = FunctionPool(Asked(key="k", function=functions + "path", kind=RewardFunction))
    said = await asyncio.gather(*(pool.ask({}, "", []) for _ in range(6)))
    pool.close()

    pids = {int(str(one.value)) for one in said}
    assert 1 <= len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def scored(model, case: str | None) -> Stored[ScoredTrajectory]:
    row = None if case is None else {"case": case}
    trajectory = answered(model, "24", row)
    size = len(trajectory.response_ids)
    signal = TeacherSignal(
        teacher="t",
        token_logprobs=np.full(size, -2.0, np.float32),
        entropy=Exact(np.full(size, 0.5, np.float32)),
        topk_ids=np.zeros((size, 1), np.int32),
        topk_logprobs=np.zeros((size, 1), np.float32),
        tail_logprobs=np.zeros(size, np.float32),
    )
    header = Header.of(trajectory, {}, 0.5)
    return Stored(header, ScoredTrajectory(trajectory=trajectory, signal=signal))


async def test_a_filter_keeps_drops_or_fails(functions, model):
    async def sifted(case: str | None, nats: float) -> object:
        function = FilterConfig(function=functions + "keep", options={"nats": nats})
        sieve = Filter(function, model)
        try:
            return await sieve.sift(scored(model, case))
        finally:
            sieve.close()

    kept, dropped = await sifted("kept", 3.0), await sifted("dropped", 1.0)
    assert isinstance(kept, Stored) and kept.body.trajectory.prompt.row is None
    assert isinstance(dropped, LostTrajectory)
    assert (dropped.reason, dropped.detail) == (
        LostReason.FILTERED,
        "made_up_functions:keep returned False",
    )

    for case, words in (("raises", "no such key"), ("number", "returned 1; it must be True")):
        failed = await sifted(case, 1.0)
        assert isinstance(failed, LostTrajectory) and words in failed.detail
        assert failed.reason is LostReason.FILTER_FAILED

    assert isinstance(await sifted(None, 1.0), Stored), "what is measured is not filtered"
