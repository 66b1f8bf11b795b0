"""What our plugin does to a process of vLLM."""

import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from processes import FORKED

REGISTER = """
import ctypes
import gc
import vllm.v1.engine.async_llm
from eopd.vllm_plugin import register
register()
granted = ctypes.c_uint64()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted))  # arch_prctl, ARCH_GET_XCOMP_PERM
print(gc.get_freeze_count(), granted.value)
"""
TILES = 1 << 18  # XFEATURE_XTILEDATA


@pytest.fixture(scope="module")
def registered():
    """What a process says that has called ``register``: the number of its objects that no collection
    looks at, and the features of its processor that Linux lets it use.
    """
    done = subprocess.run(
        [sys.executable, "-c", REGISTER], capture_output=True, text=True, check=True
    )
    frozen, granted = map(int, done.stdout.split()[-2:])
    return frozen, granted, done.stdout + done.stderr


def test_collections_pass_over_what_was_imported_and_nothing_is_reported_as_leaked(registered):
    frozen, _, said = registered
    assert frozen > 100_000
    assert "leaked" not in said


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the processor has no AMX")
def test_linux_lets_the_process_use_tiles(registered):
    assert registered[1] & TILES


def _engine(pipe):
    from eopd.vllm_plugin import register

    register()
    pipe.send(os.getpid())
    time.sleep(600)


def _actor(pipe):
    multiprocessing.get_context("fork").Process(target=_engine, args=(pipe,)).start()
    time.sleep(600)


def test_an_engine_process_does_not_outlive_the_process_that_started_it():
    ours, theirs = multiprocessing.Pipe()
    actor = FORKED.Process(target=_actor, args=(theirs,))
    actor.start()
    engine = psutil.Process(ours.recv())
    assert engine.is_running()

    actor.kill()
    engine.wait(timeout=20)
