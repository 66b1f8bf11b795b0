"""An engine in a thread of its actor: the same as one in a process, also where it fails."""

import asyncio
import multiprocessing
import os
import signal
import threading

import fakes
import pytest
import torch
from moving_weights import start
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.v1.engine.async_llm import AsyncLLM

from eopd.async_llm import _CoreThread, start_llm
from eopd.config import ConfigError
from eopd.roles import EngineDownError
from eopd.types import PolicyVersion, Sampling


def cores() -> list[_CoreThread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, _CoreThread)]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """Tests of other files share this process."""
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # an engine replaces it
    threads = torch.get_num_threads()
    yield
    for core in cores():
        core.join(timeout=30)

    cleanup_dist_env_and_memory()
    monkeypatch.undo()
    torch.set_num_threads(threads)


async def write(engine):
    sampling = Sampling(temperature=1.0, max_tokens=20, seed=5)
    return (await engine.generate(fakes.prompt("p", [7, 8, 9]), 0, sampling)).body


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_model_is_looked_at_in_this_process_on_cpus_alone(tmp_path, monkeypatch, on_cpu):
    def look(args, **options):
        return registry._run_in_subprocess

    own = registry._run_in_subprocess
    monkeypatch.setattr(AsyncLLM, "from_engine_args", look)
    options = {"model": str(tmp_path)}
    used = start_llm(options, on_cpu=on_cpu, in_thread=False, stat_loggers=[])
    assert (used is own) != on_cpu
    assert not on_cpu or used(os.getpid) == os.getpid()
    assert registry._run_in_subprocess is own


async def test_it_has_no_process_and_writes_what_one_with_a_process_writes(tiny_model):
    student = tiny_model("llama", seed=1, scale=0.2)
    other = await start(student)
    expected = await write(other)
    processes = multiprocessing.active_children()
    engine = await start(student, in_thread=True)
    assert multiprocessing.active_children() == processes

    found = await write(engine)
    assert found.response_ids.tolist() == expected.response_ids.tolist()
    assert found.rollout_logprobs == pytest.approx(expected.rollout_logprobs, abs=1e-6)
    assert await engine.version() == PolicyVersion(0, 0)

    with pytest.raises(RuntimeError, match="this process has an engine already"):
        await start(student, in_thread=True)

    assert (await write(engine)).response_ids.tolist() == expected.response_ids.tolist()
    await other.close()
    await engine.close()
    (core,) = cores() or [None]
    if core is not None:
        core.join(timeout=30)

    assert cores() == []


async def test_what_is_asked_of_a_core_that_dies_meanwhile_has_an_end(tiny_model):
    others = set(multiprocessing.active_children())
    engine = await start(tiny_model("llama", seed=1, scale=0.2))
    (core,) = set(multiprocessing.active_children()) - others
    os.kill(core.pid, signal.SIGSTOP)
    asked = [engine.version(), engine.check_weights(), engine.install_weights(PolicyVersion(0, 1))]
    answers = [asyncio.ensure_future(call) for call in asked]
    done, _ = await asyncio.wait(answers, timeout=1.0)
    assert done == set()

    core.kill()
    for answer in answers:
        with pytest.raises(EngineDownError):
            await asyncio.wait_for(answer, timeout=20.0)

    await engine.close()


async def test_one_that_does_not_start_says_why(tiny_model):
    """vLLM's own words advise ``gpu_memory_utilization``, which changes nothing on a CPU."""
    student = tiny_model("llama", seed=1, scale=0.2)
    says = "vllm.kv_cache_memory_bytes: a KV cache of 1 bytes is too small .*No available memory"
    with pytest.raises(ConfigError, match=says):
        await start(student, in_thread=True, kv_cache_memory_bytes=1)


async def test_one_that_fails_is_down_and_its_process_is_told(tiny_model):
    engine = await start(tiny_model("llama", seed=1, scale=0.2), in_thread=True)
    (core,) = cores()

    def fails():
        raise OSError("no memory is left")

    core._core.step_fn = fails
    with pytest.raises(EngineDownError):
        await write(engine)

    core.join(timeout=30)
    assert core.exitcode == 1
    with pytest.raises(EngineDownError):
        await engine.version()

    await engine.close()
