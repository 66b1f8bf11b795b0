"""The engine that writes: vLLM ``AsyncLLM`` behind the ``RolloutEngine`` role.

In: a prompt and how to sample it. Out: the response with the log-probability and the policy version of every token.
Weights arrive in flight (``EngineLink`` of ``weights/channel.py``): running requests are frozen, not aborted, and go on
under the new weights. Left out: any sampling transform (top-p, penalties), since the recorded log-probability would not
be the policy's own.

vLLM internals used here were checked against 0.32.0: ``weight_versions`` spans, ``logprobs_mode``, the weight-transfer
calls.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Self
from uuid import uuid4

import numpy as np
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from eopd.config import RolloutConfig, StudentConfig
from eopd.roles import EngineDownError
from eopd.types import (
    Header,
    Int32Array,
    LossReason,
    LostTrajectory,
    PolicyVersion,
    PromptSample,
    Sampling,
    StopReason,
    Stored,
    Trajectory,
    TrajectoryKey,
)

FINISH_REASONS = {"stop": StopReason.END_TOKEN, "length": StopReason.LENGTH}


class VllmRolloutEngine:
    """One vLLM engine serving the student. Make it with ``start``; every method is safe to call concurrently."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    @classmethod
    async def start(
        cls,
        student: StudentConfig,
        rollout: RolloutConfig,
        *,
        max_sequence_tokens: int,
        weight_backend: str,
        version: PolicyVersion,
    ) -> Self:
        """Start the engine, warm it up, and label its weights ``version``."""
        options: dict[str, object] = {
            "model": str(student.model),
            "dtype": student.dtype,
            "max_model_len": max_sequence_tokens,
            "logprobs_mode": "processed_logprobs",  # include the temperature
            "weight_transfer_config": WeightTransferConfig(backend=weight_backend),
            "enable_prefix_caching": False,  # cached prefixes of old weights must serve no new request
            "disable_log_stats": True,
            "generation_config": "auto",
        }
        if rollout.gpus == 0:
            options |= {
                "kv_cache_memory_bytes": 1 << 30,
                "enforce_eager": True,
                # A seeded request whose prefill is cut rewinds its generator, which CPU generators cannot (0.32.0).
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(2048, max_sequence_tokens),
            }
        engine = cls(AsyncLLM.from_engine_args(AsyncEngineArgs(**(options | dict(rollout.vllm)))))
        await engine._llm.update_weight_version(version.label)
        await engine._warm_up()
        return engine

    async def _warm_up(self) -> None:
        """One throw-away token: a pause must never wait for a first step that still compiles."""
        params = SamplingParams(
            max_tokens=2, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        async for _ in self._llm.generate(TokensPrompt(prompt_token_ids=[1]), params, uuid4().hex):
            pass

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Sample one response. A request that fails is a ``LostTrajectory``.

        Raises:
            EngineDownError: the engine's processes died.
        """
        started = time.monotonic()
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,  # the sampled token only
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = TokensPrompt(prompt_token_ids=prompt.token_ids.tolist())
        key = TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index)
        final: RequestOutput | None = None
        try:
            async for output in self._llm.generate(request, params, uuid4().hex):
                final = output
        except EngineDeadError as error:
            raise EngineDownError("its engine died") from error
        except EngineGenerateError as error:
            return LostTrajectory(key=key, reason=LossReason.ROLLOUT_FAILED, detail=str(error))
        if final is None or final.outputs[0].finish_reason not in FINISH_REASONS:
            reason = final.outputs[0].finish_reason if final else "no output"
            return LostTrajectory(key=key, reason=LossReason.ROLLOUT_FAILED, detail=f"finish reason {reason}")
        trajectory = _trajectory(prompt, sample_index, final.outputs[0])
        spent = time.monotonic() - started
        sums = {"generate_s": spent, "rollout_logprob": float(trajectory.rollout_logprobs.sum())}
        return Stored(Header.of(trajectory, sums), trajectory)

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:
        """Join the transfer group of the sender (blocks until the sender has joined too)."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(init_info)))

    async def receive_weights(self) -> None:
        """Start taking new weights into host memory; generation goes on. Returns at once."""
        await self._update("receive")
        await self._llm.finish_weight_update()

    async def install_weights(self, version: PolicyVersion) -> float:
        """Pause, load what was received, label it, resume.

        Returns:
            Seconds for which no engine step ran.
        """
        started = time.monotonic()
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._update("load")
        await self._llm.finish_weight_update(weight_version=version.label)
        await self._llm.resume_generation()
        return time.monotonic() - started

    async def _update(self, phase: str) -> None:
        """One phase as an update of its own: one that spanned both would stay active after a transfer that was given
        up, and vLLM (0.32.0) would start no other.
        """
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"phase": phase}))

    async def version(self) -> PolicyVersion:
        """The label of the weights that serve now."""
        return PolicyVersion.parse(await self._llm.get_weight_version())

    async def close(self) -> None:
        """Stop the engine's processes."""
        self._llm.shutdown()


def _trajectory(prompt: PromptSample, sample_index: int, output: CompletionOutput) -> Trajectory:
    response_ids = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, response_ids.tolist(), strict=True)]
    return Trajectory(
        prompt=prompt,
        sample_index=sample_index,
        response_ids=response_ids,
        loss_mask=np.ones(len(response_ids), dtype=np.bool_),
        rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
        policy_versions=_versions(output.weight_versions, len(response_ids)),
        stop_reason=FINISH_REASONS[output.finish_reason],
    )


def _versions(spans: Sequence[WeightVersionSpan], num_tokens: int) -> Int32Array:
    """Spans of (label, start, end) to one version a token; raises ValueError when they leave a gap."""
    versions = np.full(num_tokens, -1, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = PolicyVersion.parse(span.version).step
    if (versions < 0).any():
        raise ValueError(f"weight versions {spans} do not cover {num_tokens} tokens")
    return versions
