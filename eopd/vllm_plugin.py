"""The ``vllm.general_plugins`` entry point registers what vLLM's engine and worker processes need.

They are spawned, so that they do not see what their parent registers: each calls ``register``
when it starts.
"""

import atexit
import gc
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from threading import Thread

import torch

from eopd.teacher import head
from eopd.weights import vllm_receiver


def register() -> None:
    """Registers the scoring head and the weight-transfer engine; vLLM may call this more than once.

    vLLM's attention on CPUs uses the tiles of AMX where a processor has them, and Linux ends a process
    that has not asked for them (SIGILL; 0.32.0, ``csrc/cpu/cpu_attn_amx.hpp``). oneDNN asks when it
    first multiplies in bfloat16, which a model with small matrices may never make it do. So it is
    asked for here.

    What was imported until now stays, so that no collection need look at it: vLLM makes five whole
    ones before an engine is up (0.32.0), of half a second each. At the end of the process it may be
    collected, or libraries would report it as leaked.
    """
    head.register()
    vllm_receiver.register()
    _end_with_parent()
    torch.cpu._init_amx()  # without AMX it does nothing
    gc.freeze()
    atexit.register(gc.unfreeze)


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however that ended: vLLM's engine
    process would go on, and hold its GPU (0.32.0, ``v1/engine/core.py``).
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
