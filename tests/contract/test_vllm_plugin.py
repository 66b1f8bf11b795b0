"""What our plugin does to a process of vLLM."""

import subprocess
import sys

import pytest
import torch

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
