"""The rollout engine and the weight channel on real vLLM: recorded log-probabilities are the
policy's, versions are the weights'.
"""

import asyncio
import shutil
from dataclasses import replace

import fakes
import numpy as np
import pytest
import pytest_asyncio
import torch
from moving_weights import PROBE, Sender, channel_of, load, logprobs_of, start

from eopd.config import LoraConfig
from eopd.learner.lora import add_adapters
from eopd.tokenizer import load_tokenizer
from eopd.types import PolicyVersion, Sampling, StopReason, Trajectory

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["qwen3", pytest.param("llama", marks=pytest.mark.slow)],
)
async def engine(request, tiny_model):
    """An engine of a family, and two sets of its weights; it begins with the first one."""
    old, new = (tiny_model(request.param, seed=seed, scale=0.2) for seed in (1, 2))
    engine = await start(old)
    yield engine, load(old), load(new)
    await engine.close()


async def test_a_seed_names_a_response_and_the_end_token_belongs_to_it(engine):
    engine, _, _ = engine

    async def write(ids: list[int], index: int, max_tokens: int, seed: int):
        sampling = Sampling(temperature=1.0, max_tokens=max_tokens, seed=seed)
        return await engine.generate(fakes.prompt("p", ids), index, sampling)

    twice = await asyncio.gather(*(write([7, 8, 9], index, 300, 5) for index in (0, 1)))
    other = await write([7, 8, 9], 2, 300, 6)
    crowd = await asyncio.gather(  # more prompt tokens than one engine step takes
        *(write([9] * 100, index, 2, index) for index in range(30))
    )
    assert [stored.header.key.sample_index for stored in crowd] == list(range(30))
    first, second = (stored.body for stored in twice)
    assert (
        first.response_ids.tolist()
        == second.response_ids.tolist()
        != other.body.response_ids.tolist()
    )

    for stored in (*twice, other):
        ended = stored.header.stop_reason is StopReason.END_TOKEN
        # 2 is the end token of the tiny tokenizer
        assert (stored.body.response_ids[-1] == 2) == ended
        assert 2 not in stored.body.response_ids[:-1]
        assert stored.header.num_response_tokens == len(stored.body.response_ids)
        assert ended or len(stored.body.response_ids) == 300


async def test_a_benchmark_samples_from_the_top_and_ends_at_a_text(engine, tiny_model):
    engine, old, _ = engine
    tokenizer = load_tokenizer(tiny_model("qwen3", seed=1, scale=0.2))
    one = fakes.prompt("p", [5, 80, 90, 33])
    surest = Sampling(temperature=1.0, max_tokens=12, seed=1, top_p=1e-6, priority=-5)
    whole = (await engine.generate(one, 0, surest)).body
    text = tokenizer.decode(whole.response_ids)

    ids = one.token_ids.tolist()
    with torch.no_grad():
        for _ in whole.response_ids:
            ids.append(int(old(torch.tensor([ids])).logits[0, -1].argmax()))

    assert whole.response_ids.tolist() == ids[len(one.token_ids) :]
    assert whole.rollout_logprobs == pytest.approx(0.0, abs=1e-6)

    stop = text[4:6]
    cut = (await engine.generate(one, 0, replace(surest, stop=("never", stop)))).body
    count = len(cut.response_ids)
    assert 0 < count < len(whole.response_ids)
    assert cut.response_ids.tolist() == whole.response_ids[:count].tolist()
    assert stop in tokenizer.decode(cut.response_ids)
    assert stop not in tokenizer.decode(cut.response_ids[:-1])
    assert cut.stop_reason is StopReason.END_TOKEN
    assert len(cut.policy_versions) == count


async def publish_in_flight(engine, new, prompt, *, temperature):
    """Publishes new weights while a response is written; returns it, and what the publish says."""
    sender, condemned = Sender(new), []
    channel = channel_of(sender, engine, condemned, probe_every=0)
    long = asyncio.create_task(
        engine.generate(prompt, 0, Sampling(temperature=temperature, max_tokens=400, seed=11))
    )
    await asyncio.sleep(0.3)
    stats = await channel.publish(sender.held)
    spanning = (await long).body
    assert condemned == []

    return spanning, stats


async def test_weights_move_in_flight_and_every_token_names_its_version(engine):
    engine, old, new = engine
    one = fakes.prompt("p", [5, 80, 90, 33])
    spanning, stats = await publish_in_flight(engine, new, one, temperature=0.7)
    after = (
        await engine.generate(
            one,
            1,
            Sampling(temperature=0.7, max_tokens=40, seed=12),
        )
    ).body
    assert stats.num_bytes == sum(p.numel() * 4 for p in new.parameters())
    assert (after.policy_versions == 1).all()

    def expected(model, body: Trajectory) -> np.ndarray:
        ids = np.concatenate([one.token_ids, body.response_ids])
        return logprobs_of(model, ids, 0.7)[len(one.token_ids) - 1 :]

    np.testing.assert_allclose(after.rollout_logprobs, expected(new, after), atol=2e-4)
    versions = spanning.policy_versions
    assert set(versions.tolist()) == {0, 1}
    assert (np.diff(versions) >= 0).all()
    assert len(versions) == len(spanning.response_ids) == len(spanning.rollout_logprobs)
    before = int((versions == 0).sum())
    np.testing.assert_allclose(
        spanning.rollout_logprobs[:before],
        expected(old, spanning)[:before],
        atol=2e-4,
    )
    np.testing.assert_allclose(
        spanning.rollout_logprobs[before:],
        expected(new, spanning)[before:],
        atol=2e-4,
    )
    assert await engine.version() == PolicyVersion(0, 1)


async def test_adapters_alone_are_merged_with_the_weights_in_the_files(engine):
    """The engine holds other weights by now, from the test before: all come from its files."""
    engine, old, _ = engine
    lora = LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj", "mlp.down_proj"))
    adapted = load(old.name_or_path)
    add_adapters(adapted, lora, seed=0)
    trained = [matrix for matrix in adapted.parameters() if matrix.requires_grad]
    torch.manual_seed(3)
    with torch.no_grad():
        for matrix in trained:
            matrix.normal_(std=0.2)

    sender, condemned = Sender(adapted, scale=lora.scale), []
    sender.held = PolicyVersion(0, 2)
    stats = await channel_of(sender, engine, condemned).publish(sender.held)
    assert condemned == []
    assert stats.num_bytes == sum(matrix.numel() * 4 for matrix in trained)
    assert await engine.version() == PolicyVersion(0, 2)

    found = await engine.probe(PROBE)
    np.testing.assert_allclose(found, logprobs_of(adapted, PROBE), atol=2e-4)
    assert np.abs(found - logprobs_of(old, PROBE)).max() > 0.1


async def test_a_response_may_keep_what_it_has_read_under_old_weights(tiny_model):
    """Oracle: transformers reads the beginning with the old weights, and goes on from its cache
    with the new ones.
    """
    directories = [tiny_model("qwen3", seed=seed, scale=0.2) for seed in (1, 2)]
    old, new = map(load, directories)
    engine = await start(directories[0], keep_kv=True)
    try:
        one = fakes.prompt("p", [5, 80, 90, 33])
        body, _ = await publish_in_flight(engine, new, one, temperature=1.0)
    finally:
        await engine.close()

    before = int((body.policy_versions == 0).sum())
    assert 0 < before < len(body.response_ids)

    tokens = torch.from_numpy(np.concatenate([one.token_ids, body.response_ids])).long()
    read = len(one.token_ids) + before - 1  # the last token is read in the step that goes on
    with torch.no_grad():
        cache = old(tokens[None, :read], use_cache=True).past_key_values
        logits = new(tokens[None, read:-1], past_key_values=cache).logits[0].double()

    expected = torch.log_softmax(logits, -1).gather(1, tokens[read + 1 :, None])[:, 0].numpy()
    found = body.rollout_logprobs[before:]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    alone = logprobs_of(new, tokens.numpy())[read:]
    assert np.abs(found - alone).max() > 0.01, "it was read again under the new weights"


async def test_padding_of_the_head_is_never_sampled(tiny_model, tmp_path):
    """Before and after new weights, in samples and in the probe."""
    padded = []
    padding = 64
    one = fakes.prompt("p", [5, 80, 90, 33])
    for seed in (1, 2):
        model = load(tiny_model("qwen3", seed=seed, scale=0.2))
        size = model.config.vocab_size
        model.resize_token_embeddings(size + padding)
        with torch.no_grad():
            model.get_output_embeddings().weight[size:] = 2.0 * torch.randn(padding, 64)

        padded.append(model)

    shutil.copytree(tiny_model("qwen3", seed=1, scale=0.2), tmp_path / "model")
    padded[0].save_pretrained(tmp_path / "model")
    engine = await start(tmp_path / "model", num_tokens=size)
    condemned = []
    sampling = Sampling(temperature=1.5, max_tokens=200, seed=1)
    said = []

    try:
        said.append(
            (
                (
                    await engine.generate(
                        one,
                        0,
                        sampling,
                    )
                ).body,
                await engine.probe(one.token_ids),
            )
        )
        sender = Sender(padded[1])
        await channel_of(sender, engine, condemned, probe_every=0).publish(sender.held)
        said.append(
            (
                (
                    await engine.generate(
                        one,
                        0,
                        sampling,
                    )
                ).body,
                await engine.probe(one.token_ids),
            )
        )
    finally:
        await engine.close()

    assert condemned == []

    for model, (body, probed) in zip(padded, said, strict=True):
        assert body.response_ids.max() < size
        ids = np.concatenate([one.token_ids, body.response_ids])
        split = len(one.token_ids)
        own = logprobs_of(model, ids, 1.5, num_tokens=size)[split - 1 :]
        np.testing.assert_allclose(body.rollout_logprobs, own, atol=2e-4)
        np.testing.assert_allclose(
            probed,
            logprobs_of(model, one.token_ids, num_tokens=size),
            atol=2e-4,
        )
