"""Adapters and the weights that they belong to become one, in an engine that has the weights."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eopd.adapters import merge, merged
from eopd.config import Config, LoraConfig
from eopd.learner.lora import add_adapters
from eopd.runtime.learner_actor import LearnerActor, sent_tensors
from eopd.types import RunFailedError

SCALE = 1.5
LORA = LoraConfig(
    rank=2, alpha=3.0, target_modules=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
)


@pytest.fixture
def adapters():
    torch.manual_seed(0)
    return {"up.lora_A.weight": torch.randn(2, 6), "up.lora_B.weight": torch.randn(4, 2)}


def merge_all(weights, adapters, dtype=torch.float32):
    device = torch.device("cpu")
    return merged(weights.items(), adapters, scale=SCALE, dtype=dtype, device=device)


def test_a_layer_with_an_adapter_gets_their_product_and_others_stay(adapters):
    weights = {
        "norm.weight": torch.ones(3),
        "up.weight": torch.randn(4, 6),
        "up.bias": torch.ones(4),
    }
    found = dict(merge_all(weights, adapters))
    product = adapters["up.lora_B.weight"] @ adapters["up.lora_A.weight"]
    torch.testing.assert_close(found.pop("up.weight"), weights["up.weight"] + 1.5 * product)
    assert all(torch.equal(found[name], weights[name]) for name in ("norm.weight", "up.bias"))
    assert len(found) == 2


def test_a_layer_of_many_rows_is_merged_in_parts():
    weight, a, b = torch.randn(2500, 8), torch.randn(2, 8), torch.randn(2500, 2)
    torch.testing.assert_close(merge(weight, a, b, scale=SCALE), weight + 1.5 * (b @ a))


def test_weights_without_adapters_are_cast_too(adapters):
    weights = {"up.weight": torch.randn(4, 6), "norm.weight": torch.tensor([1 / 3])}
    found = dict(merge_all(weights, adapters, torch.bfloat16))
    assert torch.equal(found["norm.weight"], weights["norm.weight"].bfloat16())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_cast_before_as_the_learner_has_cast_it(adapters, stored):
    weight = torch.randn(4, 6).to(stored)
    adapters = {name: matrix.bfloat16() for name, matrix in adapters.items()}
    ((_, found),) = merge_all({"up.weight": weight}, adapters, torch.bfloat16)
    a, b = adapters.values()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, merge(weight.bfloat16(), a, b, scale=SCALE))


def test_an_adapter_of_no_weight_is_an_error(adapters):
    with pytest.raises(ValueError, match=r"hold no up\.weight, which has an adapter"):
        list(merge_all({"down.weight": torch.ones(4, 6)}, adapters))


# --- what engines are sent


@pytest.fixture
def sent(tiny_model, tmp_path):
    """A function that tells what engines are sent of an adapted model whose files are rewritten."""

    def tell(rewrite=lambda directory: None, **rollout):
        directory = shutil.copytree(tiny_model("qwen3", seed=1), tmp_path / "student")
        model = AutoModelForCausalLM.from_pretrained(directory)
        add_adapters(model, LORA, seed=0)
        rewrite(directory)
        config = Config(
            run={"name": "sent", "batches": 1},
            student={"model": directory, "lora": LORA},
            rollout=rollout,
            teachers=[{"model": directory}],
            prompts={"data": "unused.jsonl", "held_out": "unused.jsonl"},
            flow={"batch_prompts": 1},
        )
        tensors, scale = sent_tensors(model, config)
        return set(tensors), scale

    return tell


def test_engines_that_have_the_weights_are_sent_adapters_alone(sent):
    names, scale = sent()
    assert len(names) == 4 and scale == 1.5
    assert {name.rpartition(".lora_")[2] for name in names} == {"A.weight", "B.weight"}


def to_bin(directory):
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def to_other_names(directory):
    weights = load_file(directory / "model.safetensors")
    renamed = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, directory / "model.safetensors")


def to_whole_numbers(directory):
    weights = load_file(directory / "model.safetensors")
    rounded = {name: tensor.to(torch.int8) for name, tensor in weights.items()}
    save_file(rounded, directory / "model.safetensors")


def to_two_formats(directory):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")


@pytest.mark.parametrize("rewrite", [to_bin, to_other_names, to_whole_numbers, to_two_formats])
def test_where_the_files_do_not_hold_them_all_weights_are_sent(sent, rewrite):
    names, scale = sent(rewrite)
    assert "model.norm.weight" in names and scale is None


def test_an_engine_that_reads_no_files_is_sent_all_weights(sent):
    names, scale = sent(vllm={"load_format": "dummy"})
    assert "model.norm.weight" in names and scale is None


class Rank:
    """A rank whose checkpoints hold other frozen weights than the model's files."""

    weights = 1

    def frozen(self):
        return [self.weights]

    def load(self, directory, fresh_optimizer):
        self.weights = 2


@pytest.mark.parametrize("alone", [True, False])
def test_adapters_of_other_weights_are_not_sent_alone(tmp_path, alone):
    actor = object.__new__(LearnerActor)
    actor._rank, actor._sends_adapters = Rank(), alone
    with pytest.raises(RunFailedError, match=r"^student\.model: ") if alone else nullcontext():
        actor.load(tmp_path, fresh_optimizer=False)

    assert actor._rank.weights == 2
