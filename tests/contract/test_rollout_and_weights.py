"""The rollout engine and the weight channel on real vLLM: recorded log-probabilities are the policy's, versions are the
weights'.
"""

import asyncio
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eopd.config import RolloutConfig, StudentConfig
from eopd.learner.lora import whole_tensors
from eopd.rollout.engine import VllmRolloutEngine
from eopd.types import PolicyVersion, PromptSample, Sampling, StopReason
from eopd.weights import vllm_engine
from eopd.weights.channel import BroadcastChannel
from eopd.weights.probe import Probe
from eopd.weights.source import ModelSource
from eopd.weights.transfer import WeightSender
from eopd.weights.vllm_engine import engine_options


class InProcessSender:
    """``SenderLink`` over a ``WeightSender`` in this process."""

    def __init__(self, model: torch.nn.Module, bucket_bytes: int) -> None:
        self.sender = WeightSender(
            ModelSource(whole_tensors(model), rank=0, zero_stage=0),
            rank=0,
            backend="gloo",
            address="127.0.0.1",
            bucket_bytes=bucket_bytes,
            connect_timeout_s=60.0,
            timeout_s=60.0,
        )

        self.held = PolicyVersion(0, 0)

    def reserved(self):
        return nullcontext()

    async def version(self):
        return self.held

    async def open(self, engine_workers):
        return self.sender.open(engine_workers)

    async def accept(self):
        await asyncio.to_thread(self.sender.accept)

    async def send(self):
        return await asyncio.to_thread(self.sender.send)


def condemned(number: int, reason: str) -> None:
    pytest.fail(f"engine {number}: {reason}")


def prompt(token_ids: list[int]) -> PromptSample:
    return PromptSample(
        epoch=0, prompt_id="p", source="test", token_ids=np.array(token_ids, np.int32), reference_answer=None
    )


def logprobs_of(
    model: torch.nn.Module, prompt_ids: list[int], response_ids: np.ndarray, temperature: float
) -> np.ndarray:
    """Oracle: transformers, float32, full forward."""
    ids = torch.tensor([prompt_ids + response_ids.tolist()])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].double() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response_ids)[:, None].long())[:, 0].numpy()


async def start(directory: Path, *, num_tokens: int | None = None, **vllm: object) -> VllmRolloutEngine:
    return await VllmRolloutEngine.start(
        StudentConfig(model=directory, dtype="float32"),
        RolloutConfig(vllm={"kv_cache_memory_bytes": 64 << 20, **vllm}),
        max_sequence_tokens=512,
        weight_options=engine_options(),
        version=PolicyVersion(0, 0),
        num_tokens=num_tokens,
    )


def channel_of(sender: InProcessSender, engine: VllmRolloutEngine) -> BroadcastChannel:
    return BroadcastChannel(
        sender,
        {0: engine},
        workers_per_engine=1,
        probe=Probe(token_ids=np.zeros(2, np.int32), dtype="float32", every=0),
        condemn=condemned,
        connect_timeout_s=60.0,
        timeout_s=60.0,
    )


@pytest.mark.parametrize("family", ["qwen3", "llama"])
async def test_weights_move_in_flight_and_every_token_names_its_version(tiny_model, family):
    old_dir, new_dir = tiny_model(family, seed=1, scale=0.2), tiny_model(family, seed=2, scale=0.2)
    old, new = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (old_dir, new_dir))
    engine = await start(old_dir)
    try:
        sender = InProcessSender(new, bucket_bytes=50_000)
        channel = channel_of(sender, engine)
        ids = [5, 80, 90, 33]
        long = asyncio.create_task(engine.generate(prompt(ids), 0, Sampling(temperature=0.7, max_tokens=400, seed=11)))
        await asyncio.sleep(0.3)
        sender.held = PolicyVersion(0, 1)
        stats = await channel.publish(sender.held)
        spanning = (await long).body
        after = (await engine.generate(prompt(ids), 1, Sampling(temperature=0.7, max_tokens=40, seed=12))).body
    finally:
        await engine.close()

    assert stats.num_bytes == sum(p.numel() * 4 for p in new.parameters())
    assert (after.policy_versions == 1).all()
    np.testing.assert_allclose(after.rollout_logprobs, logprobs_of(new, ids, after.response_ids, 0.7), atol=2e-4)

    versions = spanning.policy_versions
    assert set(versions.tolist()) == {0, 1} and (np.diff(versions) >= 0).all()
    assert len(versions) == len(spanning.response_ids) == len(spanning.rollout_logprobs)
    before = int((versions == 0).sum())
    oracle_old = logprobs_of(old, ids, spanning.response_ids, 0.7)
    oracle_new = logprobs_of(new, ids, spanning.response_ids, 0.7)
    np.testing.assert_allclose(spanning.rollout_logprobs[:before], oracle_old[:before], atol=2e-4)
    np.testing.assert_allclose(spanning.rollout_logprobs[before:], oracle_new[before:], atol=2e-4)


async def test_a_seed_names_a_response_and_the_end_token_belongs_to_it(tiny_model):
    engine = await start(tiny_model("qwen3", seed=1))
    try:
        sampling = Sampling(temperature=1.0, max_tokens=300, seed=5)
        twice = await asyncio.gather(*(engine.generate(prompt([7, 8, 9]), i, sampling) for i in (0, 1)))
        other = await engine.generate(prompt([7, 8, 9]), 2, Sampling(temperature=1.0, max_tokens=300, seed=6))
        crowd = await asyncio.gather(  # more prompt tokens than one engine step takes
            *(engine.generate(prompt([9] * 100), i, Sampling(temperature=1.0, max_tokens=2, seed=i)) for i in range(30))
        )
    finally:
        await engine.close()
    assert [stored.header.key.sample_index for stored in crowd] == list(range(30))
    first, second = (stored.body for stored in twice)
    assert first.response_ids.tolist() == second.response_ids.tolist() != other.body.response_ids.tolist()
    for stored in (*twice, other):
        ended = stored.header.stop_reason is StopReason.END_TOKEN
        assert (stored.body.response_ids[-1] == 2) == ended  # 2 is the end token of the tiny tokenizer
        assert 2 not in stored.body.response_ids[:-1]
        assert stored.header.num_response_tokens == len(stored.body.response_ids)
        assert ended or len(stored.body.response_ids) == 300


async def test_padding_of_the_head_is_never_sampled_and_has_no_probability(tiny_model, tmp_path):
    """Before and after new weights, in samples and in the probe."""
    size, padding, ids = 320, 64, [5, 80, 90, 33]
    padded = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3", seed=seed, scale=0.2), dtype=torch.float32)
        size = model.config.vocab_size
        model.resize_token_embeddings(size + padding)
        with torch.no_grad():
            model.get_output_embeddings().weight[size:] = 2.0 * torch.randn(padding, 64)
        padded.append(model)
    shutil.copytree(tiny_model("qwen3", seed=1, scale=0.2), tmp_path / "model")
    padded[0].save_pretrained(tmp_path / "model")
    engine = await start(tmp_path / "model", num_tokens=size)
    sampling, text = Sampling(temperature=1.5, max_tokens=200, seed=1), np.array(ids, np.int32)
    try:
        said = [((await engine.generate(prompt(ids), 0, sampling)).body, await engine.probe(text))]
        sender = InProcessSender(padded[1], bucket_bytes=50_000)
        sender.held = PolicyVersion(0, 1)
        await channel_of(sender, engine).publish(sender.held)
        said.append(((await engine.generate(prompt(ids), 0, sampling)).body, await engine.probe(text)))
    finally:
        await engine.close()
    for model, (body, probed) in zip(padded, said, strict=True):
        assert body.response_ids.max() < size
        sampled = torch.tensor([ids + body.response_ids.tolist()])
        with torch.no_grad():
            logits = model(sampled).logits[0, :, :size].double()
        own = torch.log_softmax(logits[len(ids) - 1 : -1] / 1.5, -1).gather(1, sampled[0, len(ids) :, None])[:, 0]
        np.testing.assert_allclose(body.rollout_logprobs, own.numpy(), atol=2e-4)
        prompts = torch.log_softmax(logits[: len(ids) - 1], -1).gather(1, sampled[0, 1 : len(ids), None])[:, 0]
        np.testing.assert_allclose(probed, prompts.numpy(), atol=2e-4)


def test_of_layers_that_no_sync_loads_only_the_unexpected_are_logged(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    never_sent = vllm_engine._never_sent(model)
    assert never_sent == {"Sequential", "ReLU"}
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    assert logger.name == vllm_engine.finalize_layerwise_reload.__module__
    logger.addHandler(caplog.handler)
    for expecting in (vllm_engine._expecting(never_sent), nullcontext()):
        with expecting:
            for kind in ("ReLU", "Linear"):
                logger.warning("%s: Failed to load weights", kind)
            logger.warning("%s: something else", "ReLU")
    logger.removeHandler(caplog.handler)
    told = ["Linear: Failed to load weights", "ReLU: something else"]
    assert caplog.messages == [*told, "ReLU: Failed to load weights", *told]
