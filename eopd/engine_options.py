"""Every vLLM engine on CPUs, of rollouts and of teachers, has these defaults. Loads no vLLM."""

from collections.abc import Mapping

_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_SPLIT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def on_cpu(native: Mapping[str, object]) -> dict[str, object]:
    """Returns the defaults of an engine on CPUs; ``native`` are the user's options, which override
    them.

    An engine of one worker keeps it in the engine's own process: one process less that imports
    vLLM. vLLM 0.32.0 turns the short name ``uni`` back into a process of its own on CPUs, to set
    OpenMP's threads there (``platforms/cpu.py``); here they are set for the whole engine.
    """
    options: dict[str, object] = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    if not any(name in native for name in _SPLIT):
        options["distributed_executor_backend"] = _ONE_PROCESS

    return options
