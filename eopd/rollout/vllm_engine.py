"""The engine that samples responses: vLLM's ``AsyncLLM`` in the role of ``RolloutEngine``.

In: a prompt and how to sample it. Out: the response with the log-probability and the policy version
of every token. Weights arrive in flight (``EngineLink`` of ``roles.py``): running requests
are frozen, not aborted, and go on under the new weights. Left out: any sampling transform but the
top-p of benchmarks, since the recorded log-probability would not be the policy's own.

vLLM internals used here were checked against 0.32.0: ``weight_versions`` spans, ``logprobs_mode``,
the weight-transfer calls.
"""

import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self, TypeVar
from uuid import uuid4

import numpy as np
from vllm import SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerFactory

from eopd.async_llm import answer_of, cpu_options, end_llm, start_llm
from eopd.config import RolloutConfig, StudentConfig
from eopd.hub import model_directory
from eopd.roles import EngineDownError
from eopd.types import (
    Float32Array,
    Header,
    Int32Array,
    LostReason,
    LostTrajectory,
    PolicyVersion,
    PromptSample,
    Sampling,
    StopReason,
    Stored,
    Trajectory,
    TrajectoryKey,
    WeightTransferError,
)

R = TypeVar("R")

FINISH_REASONS = {"stop": StopReason.END_TOKEN, "length": StopReason.LENGTH}
PROBE_FIRST = -(2**31)  # vLLM's priority of the probe: before evaluation, which is before training


class VllmRolloutEngine:
    """One vLLM engine serving the student. Make it with ``start``; every method is safe to
    call concurrently.
    """

    def __init__(self, llm: AsyncLLM, *, keep_kv: bool) -> None:
        self._llm = llm
        self._keep_kv = keep_kv

    @classmethod
    async def start(
        cls,
        student: StudentConfig,
        rollout: RolloutConfig,
        *,
        max_sequence_tokens: int,
        weight_options: Mapping[str, object],
        num_tokens: int | None = None,
        stat_loggers: Sequence[StatLoggerFactory] = (),
        in_thread: bool = False,
    ) -> Self:
        """Start the engine and warm it up. Its weights are those of no version yet, 0.

        Args:
            student: the model that it serves.
            rollout: how it serves; its ``vllm`` options win over ours.
            max_sequence_tokens: the longest prompt and response together.
            weight_options: options for receiving new weights (``weights/vllm_receiver.py``).
            num_tokens: ids from here on are padding of the head, and get no probability; None where
                the head has no padding.
            stat_loggers: where vLLM's own metrics go, if its options ask for them.
            in_thread: whether this process may hold the engine, and will hold no other one
                (``async_llm.py``).
        """
        llm = start_llm(
            _options(student, rollout, max_sequence_tokens)
            | dict(weight_options)
            | dict(rollout.vllm),
            on_cpu=rollout.gpus == 0,
            in_thread=in_thread,
            stat_loggers=stat_loggers,
        )
        engine = cls(llm, keep_kv=rollout.keep_kv)
        if num_tokens is not None and num_tokens < engine._llm.model_config.get_vocab_size():
            leave_out = engine._llm.collective_rpc("leave_out_padding", args=(num_tokens,))
            await engine._answer(leave_out)

        await engine._answer(engine._llm.update_weight_version(PolicyVersion(0, 0).label))
        await engine._warm_up()

        return engine

    @property
    def seats(self) -> int:
        """The number of responses it samples at a time; further ones would wait inside."""
        return int(self._llm.vllm_config.scheduler_config.max_num_seqs)

    async def _warm_up(self) -> None:
        """Samples two tokens and discards them: a pause must never wait for a step that compiles."""
        params = SamplingParams(
            max_tokens=2,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in self._llm.generate(
            TokensPrompt(prompt_token_ids=[1]),
            params,
            uuid4().hex,
        ):
            pass

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Sample one response. A request that fails is a ``LostTrajectory``.

        Raises:
            EngineDownError: the engine has died.
        """
        started = time.monotonic()
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            logprobs=0,  # the sampled token only
            detokenize=bool(sampling.stop),  # else nothing here reads the text
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = TokensPrompt(prompt_token_ids=prompt.token_ids.tolist())
        key = TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index)
        priority = min(sampling.priority, 0)
        final: RequestOutput | None = None

        try:
            with _dies_as_down():
                async for output in self._llm.generate(
                    request, params, uuid4().hex, priority=priority
                ):
                    final = output
        except EngineGenerateError as error:
            return LostTrajectory(
                key=key,
                reason=LostReason.ROLLOUT_FAILED,
                detail=str(error),
            )

        if final is None or final.outputs[0].finish_reason not in FINISH_REASONS:
            reason = final.outputs[0].finish_reason if final else "no output"
            return LostTrajectory(
                key=key, reason=LostReason.ROLLOUT_FAILED, detail=f"finish reason {reason}"
            )

        trajectory = _trajectory(prompt, sample_index, final.outputs[0])
        sums = {
            "generate_s": time.monotonic() - started,
            "rollout_logprob": float(trajectory.rollout_logprobs.sum()),
        }

        return Stored(Header.of(trajectory, sums, priority=sampling.priority), trajectory)

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:
        """Leave the last transfer group, and join the sender's; blocks until all members have joined.

        Raises:
            WeightTransferError: not all have joined in time. The engine serves its old weights and
                may connect again.
        """
        request = WeightTransferInitRequest(init_info=dict(init_info))
        await self._transfer("weight_failure", self._llm.init_weight_transfer_engine(request))

    async def begin_weights(self) -> None:
        """Start to receive new weights into host memory, and return at once; generation goes on.

        Raises:
            WeightTransferError: the engine is in no group, or the group has failed: connect again.
        """
        await self._transfer("begin_weights")

    async def check_weights(self) -> None:
        """Find out, after the sender's ``send``, that every bucket arrived with the right hash.

        Raises:
            WeightTransferError: one did not; nothing was loaded. After a wrong hash the next
                ``begin_weights`` may follow, after any other failure ``connect_weights`` must.
        """
        await self._transfer("check_weights")

    async def install_weights(self, version: PolicyVersion) -> float:
        """Pause, load what ``check_weights`` has found complete, label it, resume.

        Returns:
            Seconds from asking for the pause, which the step under way ends first, to the
            resumption: the time between two engine steps, and the rest of the first. Unless
            ``rollout.keep_kv`` is set, the step after it reads all running responses again, under
            the new weights, and may take far longer than the pause.

        After any error the engine pauses, and nothing is known of its weights: replace it.
        """
        started = time.monotonic()
        await self._answer(self._install(version))
        return time.monotonic() - started

    async def _install(self, version: PolicyVersion) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=not self._keep_kv)
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={}))
        await self._llm.finish_weight_update(weight_version=version.label)
        await self._llm.resume_generation()

    async def _answer(self, call: Awaitable[R]) -> R:
        """Awaits a call of vLLM's that is no request.

        Raises:
            EngineDownError: the engine has died.
        """
        with _dies_as_down():
            return await answer_of(self._llm, call)

    async def _transfer(self, method: str, first: Awaitable[None] | None = None) -> None:
        """Await a call that loads nothing, and then a method of every worker, which returns why it
        failed.
        """
        try:
            if first is not None:
                await self._answer(first)

            failures = await self._answer(self._llm.collective_rpc(method))
        except EngineDownError:
            raise
        except Exception as error:  # across processes vLLM keeps its message, and not its type
            raise WeightTransferError(str(error)) from error

        if any(failures):
            raise WeightTransferError("; ".join(dict.fromkeys(filter(None, failures))))

    async def version(self) -> PolicyVersion:
        """Return the label of the weights that serve now.

        Raises:
            EngineDownError: the engine has died.
        """
        return PolicyVersion.parse(await self._answer(self._llm.get_weight_version()))

    async def probe(self, token_ids: Int32Array) -> Float32Array:
        """Return log-probabilities of a fixed text under the weights that serve now, for
        ``weights/probe.py``; goes before all requests that wait.

        Prompt log-probabilities have neither temperature nor any other transform, whatever
        ``logprobs_mode`` is, and never come from the prefix cache (vLLM 0.32.0).

        Args:
            token_ids: int32[N], 2 to ``max_sequence_tokens`` - 1 tokens.

        Returns:
            float32[N - 1], log-probabilities in nats of token_ids[1:], each given all tokens before
            it.

        Raises:
            EngineDownError: the engine has died.
        """
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,  # the token of the text only
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = token_ids.tolist()
        request = self._llm.generate(
            TokensPrompt(prompt_token_ids=ids), params, uuid4().hex, priority=PROBE_FIRST
        )
        with _dies_as_down():
            outputs = [output async for output in request]

        entries = outputs[-1].prompt_logprobs[1:]  # the first token has no context, and None

        return np.array(
            [entry[i].logprob for entry, i in zip(entries, ids[1:], strict=True)], np.float32
        )

    async def close(self) -> None:
        """Stop the engine."""
        end_llm(self._llm)


def _options(
    student: StudentConfig, rollout: RolloutConfig, max_sequence_tokens: int
) -> dict[str, object]:
    """``AsyncEngineArgs`` of a rollout engine, before its user's."""
    options: dict[str, object] = {
        "model": str(model_directory(student.model, weights=True)),
        # in place of the directory, since Ray takes metrics whose labels are ASCII alone (2.60.0)
        "served_model_name": "student",
        "dtype": student.chosen_dtype,
        "max_model_len": max_sequence_tokens,
        "logprobs_mode": "processed_logprobs",  # include the temperature
        # the probe's and evaluation's; those of training are equal, and come in turn
        "scheduling_policy": "priority",
        # cached prefixes of old weights must serve no new request
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "generation_config": "auto",
    }
    if rollout.gpus == 0:
        options |= {
            **cpu_options(rollout.vllm),
            # A seeded request whose prefill is cut rewinds its generator, which CPU generators
            # cannot (0.32.0).
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, max_sequence_tokens),
        }

    return options


@contextmanager
def _dies_as_down() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise EngineDownError("its engine died") from error


def _trajectory(prompt: PromptSample, sample_index: int, output: CompletionOutput) -> Trajectory:
    response_ids = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = [
        entry[token].logprob
        for entry, token in zip(output.logprobs, response_ids.tolist(), strict=True)
    ]
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
    """Returns one version for each token from spans of (label, start, end).

    Raises:
        ValueError: the spans leave a gap.
    """
    versions = np.full(num_tokens, -1, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = PolicyVersion.parse(span.version).step

    if (versions < 0).any():
        raise ValueError(f"weight versions {spans} do not cover {num_tokens} tokens")

    return versions
