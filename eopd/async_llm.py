"""What engines of vLLM have in common, those of rollouts and of teachers: their options, and how
``AsyncLLM`` starts and ends.

    on a CPU, in an actor                       everywhere else
    one process                                 two processes
      event loop: AsyncLLM                        AsyncLLM
          │ sockets                                   │ sockets
      thread: EngineCoreProc                      EngineCoreProc

By itself vLLM keeps the core of an ``AsyncLLM`` in a process of its own, which imports vLLM once more:
half of the CPU time of a start, 10 of 20 s, and 0.4 GB (0.32.0, the tiny student). A thread takes
nothing from an engine on a CPU, whose forward pass holds no lock of Python's. On a GPU, where a step is
mostly Python, it would.

vLLM internals used here were checked against 0.32.0: ``CoreEngineProcManager`` (``v1/engine/utils.py``)
makes the core's process out of ``get_mp_context``; ``EngineCoreProc.run_engine_core``
(``v1/engine/core.py``) is what runs in it; ``_run_in_subprocess``
(``model_executor/models/registry.py``) is how vLLM looks at the class of a model. On a GPU it runs its
second model runner (``v1/worker/gpu/``), on a CPU, where there is no Triton, its first
(``VllmConfig.use_v2_model_runner``). What this project touches is the same in both: the pooler, the
logits layer, the calls of a worker.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

from vllm import AsyncEngineArgs
from vllm.model_executor.models import registry
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequestType, utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerFactory

from eopd.config import ConfigError

R = TypeVar("R")

ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_SPLIT = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_log = logging.getLogger(__name__)


def cpu_options(native: Mapping[str, object]) -> dict[str, object]:
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


def usage_context(*, on_cpu: bool) -> UsageContext:
    """Returns the use by which vLLM chooses how many sequences and tokens an engine works on at a
    time, where the user's options leave that open.

    On GPUs it is the use for whole batches: 1,024 sequences and 16,384 tokens on an H100, 256 and
    8,192 on a smaller GPU (vLLM 0.32.0, ``EngineArgs.get_batch_defaults``). ``AsyncLLM`` by itself
    names a use that this table lacks, and would get 128 and 2,048. On CPUs that is kept: larger
    batches are no faster there, and need more memory.
    """
    return UsageContext.ENGINE_CONTEXT if on_cpu else UsageContext.LLM_CLASS


def start_llm(
    options: Mapping[str, Any],
    *,
    on_cpu: bool,
    in_thread: bool,
    stat_loggers: Sequence[StatLoggerFactory],
) -> AsyncLLM:
    """Starts an engine; blocks until it is up.

    Args:
        options: ``AsyncEngineArgs``.
        on_cpu: whether it runs on CPUs.
        in_thread: whether this process may hold the engine, if that has one worker and runs on a
            CPU. Then the process must hold no other one: vLLM's forward context is one per process.
        stat_loggers: where vLLM's own metrics go, if the options ask for them.

    Raises:
        ConfigError: its KV cache, on a CPU, is too small.
        Exception: whatever else has kept the engine from starting.
    """
    args = AsyncEngineArgs(**options)
    with ExitStack() as stack:
        if on_cpu:
            if args.kv_cache_memory_bytes is not None:
                stack.enter_context(_small_cache_told(args.kv_cache_memory_bytes))

            stack.enter_context(models_inspected_here())

        if on_cpu and in_thread and args.distributed_executor_backend == ONE_PROCESS:
            stack.enter_context(_core_in_thread())

        return AsyncLLM.from_engine_args(
            args,
            usage_context=usage_context(on_cpu=on_cpu),
            stat_loggers=list(stat_loggers),
        )


async def answer_of(llm: AsyncLLM, call: Awaitable[R]) -> R:
    """Returns the answer of an engine's core to a call that is no request. By itself vLLM waits for it
    for ever where the core dies meanwhile (0.32.0, ``utility_results`` of ``v1/engine/core_client.py``).

    Raises:
        EngineDeadError: the core has died.
    """
    answer = asyncio.ensure_future(call)
    waits_for: set[asyncio.Future[Any]] = {answer}
    if llm.output_handler is not None:
        waits_for.add(llm.output_handler)  # a task that ends with the core

    try:
        await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise EngineDeadError()

        return await answer
    finally:
        answer.cancel()


def end_llm(llm: AsyncLLM) -> None:
    """Ends an engine, a process of its own at once. By itself vLLM gives that 5 s, in which it
    collects garbage, and kills it then, with a warning (0.32.0, ``v1/utils.py``). A thread ends
    after the step under way.
    """
    logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)
    llm.shutdown(timeout=0)


@contextmanager
def models_inspected_here() -> Iterator[None]:
    """In this context vLLM looks at the class of a model in this process.

    By itself it starts another one, so that this one gets nothing of CUDA, and keeps the answer in a
    file of the user's: 10 s of CPU for every architecture that it has not seen on a machine.
    """
    with _replaced(registry, "_run_in_subprocess", lambda look: look()):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


class _CoreThread(threading.Thread):
    """An engine's core in this process, for vLLM in the place of a ``multiprocessing.Process``.

    ``sentinel`` is the end of a pipe that becomes readable when the thread has ended. There is no
    ``pid``, by which vLLM would kill what does not end in time.
    """

    pid = None

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(name=name, daemon=True)
        ranks = ("dp_rank", "local_dp_rank")  # of one engine: 0
        self._arguments = {key: value for key, value in arguments.items() if key not in ranks}
        self._core: EngineCoreProc | None = None
        self.exitcode: int | None = None
        self.error: Exception | None = None
        self.sentinel, self._ended = os.pipe()

    def run(self) -> None:
        """Does what ``run_engine_core`` does, but for the signals, which belong to the actor."""
        try:
            self._arguments["vllm_config"].parallel_config.reconfigure_for_independent_dp_rank()
            self._core = EngineCoreProc(**self._arguments)
            self._core.run_busy_loop()
        except SystemExit:  # the loop ends so when it was told to end
            self._end(0)
        except Exception as error:  # noqa: BLE001  # raised where the engine was asked for
            self.error = error
            _log.exception("the engine has failed")
            if self._core is not None:
                self._core._send_engine_dead()

            self._end(1)

    def _end(self, exitcode: int) -> None:
        self.exitcode = exitcode
        try:
            if self._core is not None:
                self._core.shutdown()
        finally:
            os.close(self._ended)

    def terminate(self) -> None:
        """Tells the core to end after the step under way."""
        if self._core is not None:
            self._core.shutdown_state = EngineShutdownState.REQUESTED
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


@contextmanager
def _small_cache_told(size: int) -> Iterator[None]:
    """Names the option that sets the size of the KV cache on a CPU, where vLLM finds it too small and
    advises another one, which changes nothing there.
    """
    try:
        yield
    except ValueError as error:
        if "gpu_memory_utilization" not in str(error):
            raise

        raise ConfigError(
            f"vllm.kv_cache_memory_bytes: a KV cache of {size} bytes is too small for one sequence of "
            f"full length ({error})"
        ) from error


@contextmanager
def _core_in_thread() -> Iterator[None]:
    """The engine that is made in this context gets a thread.

    Raises:
        RuntimeError: this process has such an engine already.
        Exception: whatever has kept the engine from starting.
    """
    if any(isinstance(thread, _CoreThread) for thread in threading.enumerate()):
        raise RuntimeError("this process has an engine already, and may have one")

    threads: list[_CoreThread] = []

    def make(target: object, name: str, kwargs: Mapping[str, Any]) -> _CoreThread:
        threads.append(_CoreThread(name, kwargs))
        return threads[-1]

    with _replaced(utils, "get_mp_context", lambda: SimpleNamespace(Process=make)):
        try:
            yield
        except RuntimeError as error:  # that the core has failed, see above
            cause = threads[0].error if threads else None
            raise cause or error from error
