"""A rollout engine on tiny models, and a learner's end of the weight channel in the test's
own process.
"""

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eopd.config import RolloutConfig, StudentConfig
from eopd.learner.lora import adapter_tensors, whole_tensors
from eopd.rollout.vllm_engine import VllmRolloutEngine
from eopd.types import Int32Array, PolicyVersion
from eopd.weights.channel import BroadcastChannel
from eopd.weights.layout import ModelSource
from eopd.weights.probe import Probe
from eopd.weights.transfer import WeightSender
from eopd.weights.vllm_receiver import engine_options
from eopd.weights.wire import Backend

PROBE = np.random.default_rng(3).integers(3, 320, 60).astype(np.int32)


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def logprobs_of(
    model: PreTrainedModel,
    ids: Int32Array,
    temperature: float = 1.0,
    *,
    num_tokens: int | None = None,
) -> npt.NDArray[np.float64]:
    """Oracle: transformers, float32, full forward: log-probabilities of ``ids[1:]`` among the
    first ``num_tokens``.
    """
    tokens = torch.from_numpy(ids).long()
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1, :num_tokens].double()

    return torch.log_softmax(logits / temperature, -1).gather(1, tokens[1:, None])[:, 0].numpy()


class BrittleSource(ModelSource):
    """Fails on its second bucket while it is told to."""

    fails = False

    def gather(self, bucket):
        if self.fails and "embed" not in bucket[0].name:
            raise RuntimeError("no second bucket")

        return super().gather(bucket)


def brittle_source(model: torch.nn.Module, scale: float | None = None) -> BrittleSource:
    """All of a model that is not sharded, or its adapters alone, if there is a scale of theirs."""
    return BrittleSource(
        whole_tensors(model) if scale is None else adapter_tensors(model),
        rank=0,
        shape=lambda tensor: tensor.shape,
        gathered=lambda tensors: nullcontext(False),
        scale=scale,
    )


class Sender:
    """``SenderLink`` over a ``WeightSender`` in this process, with a bit to flip in the next
    bucket on its way.
    """

    def __init__(
        self, model: PreTrainedModel, backend: Backend = "auto", scale: float | None = None
    ) -> None:
        self.sender = WeightSender(
            brittle_source(model, scale),
            rank=0,
            backend=backend,
            address="127.0.0.1",
            bucket_bytes=50_000,
            timeout_s=600.0,
            connect_timeout_s=60.0,
        )
        self.model, self.corrupts, self.held = model, False, PolicyVersion(0, 1)

    reserved = undisturbed = nullcontext()

    async def version(self):
        return self.held

    async def probe(self, token_ids):
        return logprobs_of(self.model, token_ids).astype(np.float32)

    async def open(self, engines, secret):
        return self.sender.open(engines, secret)

    async def accept(self):
        await asyncio.to_thread(self.sender.accept)
        right = self.sender._wire.broadcast

        def broadcast(message):
            message[7] ^= self.corrupts
            self.corrupts = False
            right(message)

        self.sender._wire.broadcast = broadcast

    async def send(self):
        return await asyncio.to_thread(self.sender.send)


async def start(
    directory: Path,
    weight_options: Mapping[str, object] | None = None,
    *,
    num_tokens: int | None = None,
    keep_kv: bool = False,
    in_thread: bool = False,
    **vllm: object,
) -> VllmRolloutEngine:
    return await VllmRolloutEngine.start(
        StudentConfig(model=directory, dtype="float32"),
        RolloutConfig(keep_kv=keep_kv, vllm={"kv_cache_memory_bytes": 64 << 20, **vllm}),
        max_sequence_tokens=512,
        weight_options=weight_options or engine_options(),
        num_tokens=num_tokens,
        in_thread=in_thread,
    )


def channel_of(
    sender: Sender, engine: VllmRolloutEngine, condemned: list[str], *, probe_every: int = 1
) -> BroadcastChannel:
    return BroadcastChannel(
        sender,
        {0: engine},
        probe=Probe(token_ids=PROBE, dtype="float32", every=probe_every),
        lose=lambda number, reason: condemned.append(reason),
        connect_timeout_s=60.0,
        timeout_s=60.0,
    )
