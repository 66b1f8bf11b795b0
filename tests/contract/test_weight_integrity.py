"""New weights on a real engine, when something is wrong with them: the old ones serve on, or the probe tells."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eopd.config import RolloutConfig, StudentConfig
from eopd.learner.lora import whole_tensors
from eopd.rollout.engine import VllmRolloutEngine
from eopd.types import PolicyVersion, PromptSample, Sampling, WeightTransferError
from eopd.weights.channel import BroadcastChannel
from eopd.weights.probe import ProbeError, compare_probe
from eopd.weights.source import ModelSource
from eopd.weights.transfer import WeightSender
from eopd.weights.vllm_engine import ENGINE_NAME

PROBE = np.random.default_rng(3).integers(3, 320, 60).astype(np.int32)


class BrittleSource(ModelSource):
    """Fails on its second bucket while it is told to."""

    fails = False

    def gather(self, bucket):
        if self.fails and "embed" not in bucket[0].name:
            raise RuntimeError("no second bucket")
        return super().gather(bucket)


class Sender:
    """``SenderLink`` over a ``WeightSender`` in this process, with a bit to flip in the next bucket on its way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.source = BrittleSource(whole_tensors(model), rank=0, zero_stage=0)
        self.sender = WeightSender(
            self.source,
            rank=0,
            backend="gloo",
            address="127.0.0.1",
            bucket_bytes=50_000,
            timeout_s=600.0,
            connect_timeout_s=60.0,
        )
        self.corrupts = False

    async def open(self, engine_workers):
        return self.sender.open(engine_workers)

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


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def oracle(model: PreTrainedModel) -> np.ndarray:
    """Transformers, float32, full forward: log-probabilities of ``PROBE[1:]``."""
    ids = torch.from_numpy(PROBE).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)
    return logprobs.gather(1, ids[1:, None])[:, 0].numpy().astype(np.float32)


async def start(directory: Path, **vllm: object) -> VllmRolloutEngine:
    return await VllmRolloutEngine.start(
        StudentConfig(model=directory, dtype="float32"),
        RolloutConfig(vllm={"kv_cache_memory_bytes": 64 << 20, **vllm}),
        max_sequence_tokens=512,
        weight_backend=ENGINE_NAME,
        version=PolicyVersion(0, 0),
    )


async def assert_serves(engine: VllmRolloutEngine, model: PreTrainedModel, version: PolicyVersion) -> None:
    assert await engine.version() == version
    np.testing.assert_allclose(await engine.probe(PROBE), oracle(model), atol=2e-4)
    prompt = PromptSample(epoch=0, prompt_id="p", source="test", token_ids=PROBE[:9], reference_answer=None)
    written = (await engine.generate(prompt, 0, Sampling(temperature=0.7, max_tokens=5, seed=1))).body
    assert set(written.policy_versions.tolist()) == {version.step}


async def test_a_transfer_that_fails_leaves_the_old_weights_in_service_and_the_next_one_is_taken(tiny_model):
    old_dir, new_dir = tiny_model("qwen3", seed=1, scale=0.2), tiny_model("qwen3", seed=2, scale=0.2)
    old, new = load(old_dir), load(new_dir)
    engine, sender = await start(old_dir), Sender(new)
    channel = BroadcastChannel(sender, [engine], workers_per_engine=1)
    try:
        with pytest.raises(WeightTransferError, match="in no weight transfer group"):
            await engine.receive_weights()
        await channel.connect()
        sender.corrupts = True
        with pytest.raises(WeightTransferError, match=r"bucket 1 of \d+ .* was sent as (\w{32}) and arrived as (?!\1)"):
            await channel.publish(PolicyVersion(0, 1))
        await assert_serves(engine, old, PolicyVersion(0, 0))
        await channel.publish(PolicyVersion(0, 2))  # the group is whole
        await assert_serves(engine, new, PolicyVersion(0, 2))

        sender.sender._source = BrittleSource(whole_tensors(old), rank=0, zero_stage=0)
        sender.sender._source.fails = True
        with pytest.raises(RuntimeError, match="no second bucket"):
            await channel.publish(PolicyVersion(0, 3))
        with pytest.raises(WeightTransferError, match="has left"):
            await engine.check_weights()
        with pytest.raises(WeightTransferError, match="connect again"):
            await engine.receive_weights()
        await assert_serves(engine, new, PolicyVersion(0, 2))
        await channel.connect()
        sender.sender._source.fails = False
        await channel.publish(PolicyVersion(0, 3))
        await assert_serves(engine, old, PolicyVersion(0, 3))
    finally:
        await engine.close()


FAULT = """
from eopd.weights import vllm_engine

vllm_engine._repack_tied_heads = lambda model: None

class Nothing:
    pass
"""


@pytest.mark.parametrize("faulty", [False, True])
async def test_the_probe_notices_a_tied_head_that_keeps_its_old_copy(tiny_model, tmp_path, monkeypatch, faulty):
    """The fault is brought into the engine's own process as an extension of vLLM's worker."""
    (tmp_path / "stale_head.py").write_text(FAULT)
    monkeypatch.syspath_prepend(tmp_path)
    extension = {"worker_extension_cls": "stale_head.Nothing"} if faulty else {}
    new = load(tiny_model("qwen3", seed=2, scale=0.2))
    engine = await start(tiny_model("qwen3", seed=1, scale=0.2), **extension)
    try:
        channel = BroadcastChannel(Sender(new), [engine], workers_per_engine=1)
        await channel.connect()
        await channel.publish(PolicyVersion(0, 1))
        probed = await engine.probe(PROBE)
    finally:
        await engine.close()
    assert (probed.dtype, probed.shape) == (np.float32, (len(PROBE) - 1,))
    if faulty:
        with pytest.raises(ProbeError, match="does not compute with the weights"):
            compare_probe(probed, oracle(new), dtype="float32")
    else:
        assert compare_probe(probed, oracle(new), dtype="float32") < 1e-4
