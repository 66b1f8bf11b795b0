"""New weights on a real engine, when something is wrong with them: the old ones serve on, or the probe tells."""

import asyncio
from contextlib import nullcontext
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
from eopd.weights.probe import Probe
from eopd.weights.source import ModelSource
from eopd.weights.transfer import WeightSender
from eopd.weights.vllm_engine import engine_options

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
        self.model, self.corrupts, self.held = model, False, PolicyVersion(0, 1)

    def reserved(self):
        return nullcontext()

    async def version(self):
        return self.held

    async def probe(self, token_ids):
        return oracle(self.model)

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


async def start(directory: Path, weight_options: dict[str, object] | None = None, **vllm: object) -> VllmRolloutEngine:
    return await VllmRolloutEngine.start(
        StudentConfig(model=directory, dtype="float32"),
        RolloutConfig(vllm={"kv_cache_memory_bytes": 64 << 20, **vllm}),
        max_sequence_tokens=512,
        weight_options=weight_options or engine_options(),
        version=PolicyVersion(0, 0),
    )


async def assert_serves(engine: VllmRolloutEngine, model: PreTrainedModel, version: PolicyVersion) -> None:
    assert await engine.version() == version
    np.testing.assert_allclose(await engine.probe(PROBE), oracle(model), atol=2e-4)
    prompt = PromptSample(epoch=0, prompt_id="p", source="test", token_ids=PROBE[:9], reference_answer=None)
    written = (await engine.generate(prompt, 0, Sampling(temperature=0.7, max_tokens=5, seed=1))).body
    assert set(written.policy_versions.tolist()) == {version.step}


async def connect(engine: VllmRolloutEngine, sender: Sender, workers: int) -> None:
    (info,) = await sender.open([workers])
    await asyncio.gather(sender.accept(), engine.connect_weights(info))


async def transfer(engine: VllmRolloutEngine, sender: Sender) -> None:
    await engine.receive_weights()
    await sender.send()


def channel_of(sender: Sender, engine: VllmRolloutEngine, condemned: list[str]) -> BroadcastChannel:
    return BroadcastChannel(
        sender,
        {0: engine},
        workers_per_engine=1,
        probe=Probe(token_ids=PROBE, dtype="float32", every=1),
        condemn=lambda number, reason: condemned.append(reason),
        connect_timeout_s=60.0,
        timeout_s=60.0,
    )


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_transfer_that_fails_leaves_the_old_weights_in_service_and_the_next_one_is_taken(tiny_model, workers):
    """Two workers fail together: what one says must not be taken for the other's next answer."""
    old_dir, new_dir = tiny_model("qwen3", seed=1, scale=0.2), tiny_model("qwen3", seed=2, scale=0.2)
    old, new = load(old_dir), load(new_dir)
    engine, sender = await start(old_dir, tensor_parallel_size=workers), Sender(new)
    try:
        with pytest.raises(WeightTransferError, match="in no weight transfer group"):
            await engine.receive_weights()
        await connect(engine, sender, workers)
        sender.corrupts = True
        await transfer(engine, sender)
        with pytest.raises(WeightTransferError, match=r"bucket 1 of \d+ .* was sent as (\w{32}) and arrived as (?!\1)"):
            await engine.check_weights()
        await assert_serves(engine, old, PolicyVersion(0, 0))
        await transfer(engine, sender)  # the group is whole
        await engine.check_weights()
        await engine.install_weights(PolicyVersion(0, 2))
        await assert_serves(engine, new, PolicyVersion(0, 2))

        sender.sender._source = BrittleSource(whole_tensors(old), rank=0, zero_stage=0)
        sender.sender._source.fails = True
        with pytest.raises(RuntimeError, match="no second bucket"):
            await transfer(engine, sender)
        with pytest.raises(WeightTransferError, match="has left"):
            await engine.check_weights()
        with pytest.raises(WeightTransferError, match="connect again"):
            await engine.receive_weights()
        await assert_serves(engine, new, PolicyVersion(0, 2))
        await connect(engine, sender, workers)
        sender.sender._source.fails = False
        await transfer(engine, sender)
        await engine.install_weights(PolicyVersion(0, 3))
        await assert_serves(engine, old, PolicyVersion(0, 3))
    finally:
        await engine.close()


async def test_a_corrupted_bucket_is_sent_again_and_the_probe_is_answered_before_work_that_waits(tiny_model):
    old_dir, new = tiny_model("qwen3", seed=1, scale=0.2), load(tiny_model("qwen3", seed=2, scale=0.2))
    engine, sender, condemned = await start(old_dir, max_num_seqs=1), Sender(new), []
    prompt = PromptSample(epoch=0, prompt_id="p", source="test", token_ids=PROBE[:9], reference_answer=None)
    writing = [
        asyncio.create_task(engine.generate(prompt, i, Sampling(temperature=1.0, max_tokens=400, seed=i)))
        for i in range(12)
    ]
    try:
        await asyncio.sleep(0.2)
        sender.corrupts = True
        channel = channel_of(sender, engine, condemned)
        stats = await channel.publish(sender.held)
        waiting = sum(not task.done() for task in writing)
        assert stats.probe_nats < 1e-4 and condemned == [] and channel.num_failures == 1
        assert waiting > 6, f"the probe waited for {len(writing) - waiting} responses"
        await asyncio.gather(*writing)
        await assert_serves(engine, new, sender.held)
    finally:
        await engine.close()


FAULT = """
from eopd.weights import vllm_engine
from eopd.weights.vllm_engine import WeightWorker

vllm_engine._repack_tied_heads = lambda model: None
"""


async def test_the_probe_notices_a_tied_head_that_keeps_its_old_copy(tiny_model, tmp_path, monkeypatch):
    """The fault is brought into the engine's own process as an extension of vLLM's worker."""
    (tmp_path / "stale_head.py").write_text(FAULT)
    monkeypatch.syspath_prepend(tmp_path)
    new, condemned = load(tiny_model("qwen3", seed=2, scale=0.2)), []
    faulty = engine_options() | {"worker_extension_cls": "stale_head.WeightWorker"}
    engine = await start(tiny_model("qwen3", seed=1, scale=0.2), faulty)
    try:
        channel = channel_of(Sender(new), engine, condemned)
        await channel.publish(PolicyVersion(0, 1))
    finally:
        await engine.close()
    (reason,) = condemned
    assert "twice with the same weights" in reason and "does not compute with the weights" in reason
