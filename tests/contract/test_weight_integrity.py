"""New weights on a real engine, when something is wrong with them: the old ones serve on, or
the probe tells.
"""

import asyncio
import logging
from contextlib import nullcontext

import fakes
import numpy as np
import pytest
import torch
from moving_weights import PROBE, Sender, brittle_source, channel_of, load, logprobs_of, start
from transformers import PreTrainedModel

from eopd.rollout.vllm_engine import VllmRolloutEngine
from eopd.types import PolicyVersion, Sampling, WeightTransferError
from eopd.weights import vllm_receiver
from eopd.weights.vllm_receiver import engine_options


async def assert_serves(
    engine: VllmRolloutEngine, model: PreTrainedModel, version: PolicyVersion
) -> None:
    assert await engine.version() == version
    np.testing.assert_allclose(
        await engine.probe(PROBE),
        logprobs_of(model, PROBE),
        atol=2e-4,
    )
    prompt = fakes.prompt("p", PROBE[:9])
    written = (
        await engine.generate(prompt, 0, Sampling(temperature=0.7, max_tokens=5, seed=1))
    ).body
    assert set(written.policy_versions.tolist()) == {version.step}


async def connect(engine: VllmRolloutEngine, sender: Sender) -> None:
    (info,) = await sender.open(1, "secret")
    await asyncio.gather(sender.accept(), engine.connect_weights(info))


async def transfer(engine: VllmRolloutEngine, sender: Sender) -> None:
    await engine.begin_weights()
    await sender.send()


@pytest.mark.parametrize(
    ("workers", "backend"),
    [
        (1, "auto"),
        pytest.param(2, "auto", marks=pytest.mark.slow),
        pytest.param(2, "gloo", marks=pytest.mark.slow),
    ],
)
async def test_a_failed_transfer_leaves_the_old_weights_in_service(tiny_model, workers, backend):
    """Of two workers one receives: what it says must not be taken for the other's next answer."""
    old_dir = tiny_model("qwen3", seed=1, scale=0.2)
    new_dir = tiny_model("qwen3", seed=2, scale=0.2)
    old, new = load(old_dir), load(new_dir)
    engine = await start(old_dir, tensor_parallel_size=workers)
    sender = Sender(new, backend)

    try:
        with pytest.raises(WeightTransferError, match="in no weight transfer group"):
            await engine.begin_weights()

        await connect(engine, sender)
        sender.corrupts = True
        await transfer(engine, sender)

        with pytest.raises(
            WeightTransferError,
            match=r"bucket 1 of \d+ .* was sent as (\w{32}) and arrived as (?!\1)",
        ):
            await engine.check_weights()

        await assert_serves(engine, old, PolicyVersion(0, 0))
        await transfer(engine, sender)  # the group is whole
        await engine.check_weights()
        await engine.install_weights(PolicyVersion(0, 2))
        await assert_serves(engine, new, PolicyVersion(0, 2))

        sender.sender._source = brittle_source(old)
        sender.sender._source.fails = True
        with pytest.raises(RuntimeError, match="no second bucket"):
            await transfer(engine, sender)

        with pytest.raises(WeightTransferError, match="has left"):
            await engine.check_weights()

        with pytest.raises(WeightTransferError, match="connect again"):
            await engine.begin_weights()

        await assert_serves(engine, new, PolicyVersion(0, 2))
        await connect(engine, sender)
        sender.sender._source.fails = False
        await transfer(engine, sender)
        await engine.install_weights(PolicyVersion(0, 3))
        await assert_serves(engine, old, PolicyVersion(0, 3))

        # what is in memory shared with the sender is not what serves
        sender.sender._source = brittle_source(new)
        await transfer(engine, sender)
        await engine.check_weights()
        await assert_serves(engine, old, PolicyVersion(0, 3))
    finally:
        await engine.close()


async def test_a_corrupted_bucket_is_sent_again(tiny_model):
    old_dir = tiny_model("qwen3", seed=1, scale=0.2)
    new = load(tiny_model("qwen3", seed=2, scale=0.2))
    engine = await start(old_dir, max_num_seqs=1)
    sender = Sender(new)
    condemned = []
    prompt = fakes.prompt("p", PROBE[:9])
    writing = [
        asyncio.create_task(
            engine.generate(prompt, i, Sampling(temperature=1.0, max_tokens=400, seed=i))
        )
        for i in range(12)
    ]

    try:
        await asyncio.sleep(0.2)
        sender.corrupts = True
        channel = channel_of(sender, engine, condemned)
        stats = await channel.publish(sender.held)
        waiting = sum(not task.done() for task in writing)
        assert stats.probe_nats < 1e-4
        assert condemned == []
        assert channel.num_failures == 1
        assert waiting > 6, f"the probe waited for {len(writing) - waiting} responses"
        await asyncio.gather(*writing)
        await assert_serves(engine, new, sender.held)
    finally:
        await engine.close()


FAULT = """
from eopd.weights import vllm_receiver
from eopd.weights import vllm_receiver
from eopd.weights.vllm_receiver import WeightWorker

vllm_receiver._repack_tied_heads = lambda model: None
"""


@pytest.mark.slow
async def test_the_probe_notices_a_tied_head_that_keeps_its_old_copy(
    tiny_model, tmp_path, monkeypatch
):
    """The fault is brought into the engine's own process as an extension of vLLM's worker."""
    (tmp_path / "stale_head.py").write_text(FAULT)
    monkeypatch.syspath_prepend(tmp_path)
    new = load(tiny_model("qwen3", seed=2, scale=0.2))
    condemned = []
    faulty = engine_options() | {"worker_extension_cls": "stale_head.WeightWorker"}
    engine = await start(tiny_model("qwen3", seed=1, scale=0.2), faulty)

    try:
        channel = channel_of(Sender(new), engine, condemned)
        await channel.publish(PolicyVersion(0, 1))
    finally:
        await engine.close()

    (reason,) = condemned
    assert "twice with the same weights" in reason
    assert "does not compute with the weights" in reason


def test_only_unexpected_layers_that_no_sync_loads_are_logged():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    never_sent = vllm_receiver._never_sent(model)
    assert never_sent == {"Sequential", "ReLU"}
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    assert logger.name == vllm_receiver.finalize_layerwise_reload.__module__
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)

    for expecting in (vllm_receiver._expecting(never_sent), nullcontext()):
        with expecting:
            for kind in ("ReLU", "Linear"):
                logger.warning("%s: Failed to load weights", kind)

            logger.warning("%s: something else", "ReLU")

    logger.removeHandler(handler)
    told = ["Linear: Failed to load weights", "ReLU: something else"]
    assert said == [*told, "ReLU: Failed to load weights", *told]
