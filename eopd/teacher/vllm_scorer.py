"""The teacher's engine: vLLM ``AsyncLLM`` with the scoring head, behind the ``TeacherScorer`` role.

In: a trajectory. Out: the same trajectory with the teacher's signal for every response token.
Requests are independent: score many at once and vLLM batches them. Left out: prefix caching, since
a re-scored response would be read from the cache and its rows would never reach the head.

vLLM internals used here were checked against 0.32.0: the pooling runner, ``hf_overrides``,
``additional_config``, ``extra_kwargs``. Threads and quiet logs come with the environment of the
process that hosts the engine.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast
from uuid import uuid4

import numpy as np
import torch
import vllm._custom_ops  # noqa: F401  # fills torch.ops._C with what this machine's build of vLLM has
from vllm import PoolingParams, TokensPrompt
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError
from vllm.outputs import PoolingRequestOutput
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerFactory

from eopd.async_llm import answer_of, cpu_options, end_llm, start_llm
from eopd.config import ConfigError, TeacherConfig
from eopd.hub import model_directory
from eopd.roles import TeacherDownError
from eopd.teacher import head
from eopd.teacher.base import SignalScorer, whole_sequence
from eopd.teacher.selftest import TeacherSelfTestError, check_temperature
from eopd.teacher.signal import SignalError, read_signal
from eopd.tokenizer import read_json
from eopd.types import Int32Array, TeacherSignal

_MADE_UP_TOKENS = 8
_FOUR_BIT_METHODS = ("gptq", "awq", "auto-round")


class ScoringEngine:
    """A vLLM engine that has the scoring head: token ids in, the teacher's signal out.

    Args:
        llm: the engine, started with ``engine_options``.
        teacher: the teacher's name, for signals and messages.
        top_k: K, candidates per response token.
        temperature: the teacher's.
    """

    def __init__(self, llm: EngineClient, teacher: str, *, top_k: int, temperature: float) -> None:
        self.vocab_size = int(llm.model_config.get_vocab_size())
        self._llm = llm
        self._teacher = teacher
        self._top_k = top_k
        self._temperature = temperature

    async def signal(
        self, prompt_ids: Int32Array, response_ids: Int32Array, *, temperature: float | None = None
    ) -> TeacherSignal:
        """Returns what the teacher says of a response [R] after a prompt [P], at its own
        temperature unless another one is given.

        Raises:
            SignalError: this request failed; others go on.
            TeacherDownError: the engine died.
        """
        ids = whole_sequence(self.vocab_size, prompt_ids, response_ids)
        extra = {} if temperature is None else {head.TEMPERATURE: temperature}
        params = PoolingParams(
            task=head.TASK, extra_kwargs={head.RESPONSE_TOKENS: len(response_ids), **extra}
        )
        request = TokensPrompt(prompt_token_ids=ids.tolist())

        try:
            outputs: list[PoolingRequestOutput] = [
                output async for output in self._llm.encode(request, params, uuid4().hex)
            ]
        except (EngineGenerateError, VLLMClientError) as error:
            raise SignalError(str(error)) from error
        except EngineDeadError as error:
            raise TeacherDownError(f"teacher {self._teacher}: its engine died") from error

        return read_signal(
            outputs[-1].outputs.data.numpy(),
            teacher=self._teacher,
            num_response_tokens=len(response_ids),
            top_k=self._top_k,
        )

    async def check(self, max_sequence_tokens: int) -> None:
        """Scores a few made-up tokens at the teacher's temperature and at another one.

        Raises:
            TeacherSelfTestError: the engine scores at another temperature than it was asked for.
        """
        length = min(_MADE_UP_TOKENS, max_sequence_tokens, self.vocab_size)
        tokens = np.arange(length, dtype=np.int32)
        hotter = 2 * self._temperature
        own = await self.signal(tokens[:1], tokens[1:])
        other = await self.signal(tokens[:1], tokens[1:], temperature=hotter)
        check_temperature(own, other, hotter, expected=self._temperature)


class VllmTeacherScorer(SignalScorer):
    """A teacher on a vLLM engine of this process. Make it with ``start``."""

    def __init__(self, llm: AsyncLLM, config: TeacherConfig, *, top_k: int) -> None:
        self._llm = llm
        self._engine = ScoringEngine(
            llm,
            config.name,
            top_k=top_k,
            temperature=config.temperature,
        )
        super().__init__(config, top_k=top_k, vocab_size=self._engine.vocab_size)

    @classmethod
    async def start(
        cls,
        config: TeacherConfig,
        *,
        top_k: int,
        max_sequence_tokens: int,
        stat_loggers: Sequence[StatLoggerFactory] = (),
        in_thread: bool = False,
    ) -> Self:
        """Starts the engine, and checks that it scores as hot as it should. The event loop stays
        free while the engine loads.

        Args:
            config: the teacher; its ``vllm`` options win over ours.
            top_k: K, candidates per response token.
            max_sequence_tokens: the longest prompt and response together.
            stat_loggers: where vLLM's own metrics go, if ``config.vllm`` switches them on.
            in_thread: whether this process may hold the engine, and will hold no other one
                (``async_llm.py``).

        Raises:
            ConfigError: as ``engine_options``.
            TeacherSelfTestError: it scores at another temperature than it was asked for.
        """
        llm = await asyncio.to_thread(
            start_llm,
            engine_options(config, top_k=top_k, max_sequence_tokens=max_sequence_tokens),
            on_cpu=current_platform.is_cpu(),
            in_thread=in_thread,
            stat_loggers=stat_loggers,
        )
        scorer = cls(llm, config, top_k=top_k)

        try:
            await scorer._engine.check(max_sequence_tokens)
        except TeacherSelfTestError:
            await scorer.close()
            raise

        return scorer

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Scores a response on the engine; see ``ScoringEngine.signal`` for its errors."""
        return await self._engine.signal(prompt_ids, response_ids)

    @property
    def seats(self) -> int:
        """The number of sequences that the engine works on at a time."""
        return int(self._llm.vllm_config.scheduler_config.max_num_seqs)

    async def ping(self) -> None:
        """Returns when the engine answers, between two of its steps."""
        try:
            await answer_of(self._llm, self._llm.collective_rpc("check_health"))
        except EngineDeadError as error:
            raise TeacherDownError(f"teacher {self._name}: its engine died") from error

    async def close(self) -> None:
        """Stops the engine."""
        end_llm(self._llm)


def engine_options(
    config: TeacherConfig, *, top_k: int, max_sequence_tokens: int
) -> dict[str, object]:
    """``AsyncEngineArgs`` of a teacher: our defaults, then ``config.vllm``; its two nested sections
    are merged with ours.

    Raises:
        ConfigError: the model's directory names no architecture, or this machine cannot run its
            quantised weights.
    """
    native = dict(config.vllm)
    directory = model_directory(config.model, weights=True)
    declared = read_json(directory / "config.json")
    architectures = cast(Sequence[str], declared.get("architectures"))
    if not architectures:
        raise ConfigError(f"teachers.model: {directory / 'config.json'} names no architecture")

    _require_kernels(directory, declared, native)
    overrides = {
        "architectures": [head.PREFIX + architectures[0]],
        "head_dtype": config.head_dtype,
    }
    scoring = {head.OPTIONS: {"top_k": top_k, "temperature": config.temperature}}
    options: dict[str, object] = {
        "model": str(directory),
        "served_model_name": config.name,  # as in ``rollout/vllm_engine.py``
        "dtype": config.dtype,
        "runner": "pooling",
        "max_model_len": max_sequence_tokens,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        options |= cpu_options(native)

    merged = {
        "hf_overrides": _section(native, "hf_overrides") | overrides,
        "additional_config": _section(native, "additional_config") | scoring,
    }

    return options | native | merged


def _section(native: Mapping[str, object], name: str) -> dict[str, object]:
    section = native.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"teachers.vllm.{name}: must be a mapping (is {section!r})")

    return dict(section)


def _require_kernels(
    model: Path, declared: Mapping[str, object], native: Mapping[str, object]
) -> None:
    """Refuse four-bit weights where vLLM cannot multiply with them: an engine would die at its
    first token.

    vLLM's CPU package (0.32.0) holds one build per kind of processor. GPTQ, AWQ and packed weights
    of compressed-tensors all go through ``cpu_gemm_wna16``, which the build for AVX2 lacks.
    """
    if not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return

    section = declared.get("quantization_config")
    settings = section if isinstance(section, Mapping) else {}
    method = str(native.get("quantization") or settings.get("quant_method") or "")
    if (
        any(name in method for name in _FOUR_BIT_METHODS)
        or settings.get("format") == "pack-quantized"
    ):
        raise ConfigError(
            f"teachers.model: {model} is quantised ({method}), and vLLM's CPU build for "
            "processors without AVX-512 cannot run such weights; name the model in its own "
            "precision, or use a machine with AVX-512 or a GPU"
        )
