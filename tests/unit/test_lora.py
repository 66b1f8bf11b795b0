"""Which layers get adapters, how they begin, and what a model with adapters looks like from
outside.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from eopd.config import ConfigError, LoraConfig
from eopd.learner.lora import add_adapters, check_targets, whole_tensors

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTURE = SIZES | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LLAMA, QWEN2, TIED = (
    LlamaConfig(**SIZES),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, tie_word_embeddings=True),
)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def adapted(model):
    """Matrices of the adapters by their path; B, which begins at zero, is made visible."""
    matrices = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for number, (name, matrix) in enumerate(matrices.items()):
        if "lora_B" in name:
            torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(number))

    return matrices


@pytest.mark.parametrize(
    ("config", "targets", "layers"),
    [
        (LLAMA, ["all-linear"], LINEAR),
        (TIED, ["all-linear"], LINEAR),
        (LLAMA, ["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (LLAMA, ["all-linear", "q_proj"], LINEAR),
        (LLAMA, ["model.layers.1.self_attn.v_proj"], {"v_proj"}),
    ],
)
def test_names_are_ends_of_paths_and_all_linear_leaves_out_the_head(config, targets, layers):
    model = model_of(config)
    add_adapters(model, LoraConfig(rank=2, target_modules=targets), seed=0)
    paths = {name.partition(".lora_")[0] for name in adapted(model)}
    assert {path.rpartition(".")[2] for path in paths} == layers
    assert len(paths) == (1 if "1." in targets[0] else 2 * len(layers))


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (
            LLAMA,
            ["q_proj", "proj"],
            "'proj' matches no layer of LlamaForCausalLM; its linear layers are down_proj, ",
        ),
        (LLAMA, ["q_proj", "lm_head"], "'lm_head' is the embedding or the output head"),
        (TIED, ["embed_tokens"], "'embed_tokens' is the embedding or the output head"),
        (LLAMA, ["mlp"], "'mlp' is a LlamaMLP; only linear layers can be adapted"),
        # peft takes them for the routed experts, which transformers 5 fuses
        (
            DeepseekV3Config(**MIXTURE, first_k_dense_replace=1),
            ["all-linear"],
            "peft takes .*gate_proj, up_proj",
        ),
        (
            DeepseekV3Config(**MIXTURE, first_k_dense_replace=1),
            ["gate_proj"],
            "Cannot convert PEFT target",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_without_weights(tmp_path, config, targets, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^student.lora.target_modules: .*{message}"):
        check_targets(tmp_path, LoraConfig(target_modules=targets))


def test_what_can_be_adapted_needs_no_weights(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    check_targets(tmp_path, LoraConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_seeds_give_equal_adapters_whatever_was_drawn_before(dtype):
    models = [model_of(LLAMA).to(dtype) for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (5, 5, 6), strict=True)):
        torch.manual_seed(number)
        add_adapters(model, LoraConfig(), seed=seed)
        # untouched
        assert torch.equal(
            torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(number))
        )

    first, same, other = (adapted(model) for model in models)
    assert all(
        matrix.dtype == dtype and torch.equal(matrix, same[name]) for name, matrix in first.items()
    )
    assert not any(
        torch.equal(matrix, other[name]) for name, matrix in first.items() if "lora_A" in name
    )


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        QWEN2,
        TIED,
    ],
    ids=["untied", "biases", "tied"],
)
def test_from_outside_there_is_one_plain_merged_model(config):
    base, model = model_of(config), model_of(config)
    add_adapters(model, LoraConfig(rank=2, alpha=3.0), seed=0)
    matrices = adapted(model)
    found = {name: recipe.whole() for name, recipe in whole_tensors(model).items()}
    assert found.keys() == dict(base.named_parameters()).keys()  # of tied tensors the first name

    for name, tensor in base.named_parameters():
        path = name.removesuffix(".weight")
        expected = tensor.detach()
        if f"{path}.lora_A.default.weight" in matrices:
            a, b = (matrices[f"{path}.lora_{letter}.default.weight"].detach() for letter in "AB")
            expected = expected + torch.einsum("or,ri->oi", b, a) * 1.5
            assert not torch.allclose(found[name], tensor, atol=1e-2)

        assert torch.allclose(found[name], expected, atol=1e-5), name

    merged = torch.func.functional_call(
        base,
        found,
        kwargs={"input_ids": torch.arange(7)[None]},
    ).logits
    assert torch.allclose(
        merged,
        model(input_ids=torch.arange(7)[None]).logits,
        atol=1e-4,
    )


def test_without_adapters_the_live_tensors_are_handed_out():
    model = model_of(TIED)
    parameters = dict(model.named_parameters())
    recipes = whole_tensors(model)
    assert recipes.keys() == parameters.keys()
    assert all(
        recipe.whole().data_ptr() == parameters[name].data_ptr() for name, recipe in recipes.items()
    )
