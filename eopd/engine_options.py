"""What vLLM's engines have in common, those of rollouts and of teachers. Loads no vLLM.

On a GPU vLLM 0.32.0 runs its second model runner (``v1/worker/gpu/``), on a CPU, where there is no
Triton, its first (``VllmConfig.use_v2_model_runner``). What this project touches is the same in both:
the pooler, the logits layer, the calls of a worker.
"""

from collections.abc import Mapping

ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_SPLIT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def on_cpu(native: Mapping[str, object]) -> dict[str, object]:
    """Returns the defaults of an engine on CPUs; ``native`` are the user's options, which override
    them.

    An engine of one worker keeps it in the process of its core: one less that imports vLLM. vLLM
    0.32.0 turns the short name ``uni`` back into a process of its own on CPUs, to set OpenMP's
    threads there (``platforms/cpu.py``); here they are set for the whole engine.
    """
    options: dict[str, object] = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    if not any(name in native for name in _SPLIT):
        options["distributed_executor_backend"] = ONE_PROCESS

    return options


def usage_context(*, on_cpu: bool) -> str:
    """Returns the ``UsageContext`` by which vLLM chooses how many sequences and tokens an engine
    works on at a time, where the user's options leave that open.

    On GPUs it is the use for whole batches: 1,024 sequences and 16,384 tokens on an H100, 256 and
    8,192 on a smaller GPU (vLLM 0.32.0, ``EngineArgs.get_batch_defaults``). ``AsyncLLM`` by itself
    names a use that this table lacks, and would get 128 and 2,048. On CPUs that is kept: larger
    batches are no faster there, and need more memory.
    """
    return "ENGINE_CONTEXT" if on_cpu else "LLM_CLASS"
