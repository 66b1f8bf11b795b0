"""What leaves the learner has the names and shapes of a checkpoint, which are what engines load."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HrmTextConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from eopd.config import ConfigError
from eopd.learner.lora import whole_tensors
from eopd.learner.stored import as_stored, require_separable
from eopd.weights.layout import cut_into_buckets
from eopd.weights.source import ModelSource

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIGS = {
    "dense": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3),
}


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 10**9])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_sent_is_what_a_checkpoint_holds(tmp_path, name, bucket_bytes):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    source = ModelSource(whole_tensors(model), rank=0, zero_stage=0, as_stored=as_stored(model))
    buckets = cut_into_buckets(source.metadata(), bucket_bytes)
    sent = {
        parameter.name: tensor
        for bucket in buckets
        for parameter, tensor in zip(bucket, source.gather(bucket), strict=True)
    }
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[key], tensor) for key, tensor in stored.items())
    assert {one.name: one.shape for one in source.metadata()} == {k: tuple(t.shape) for k, t in stored.items()}


def test_new_weights_are_sent_and_not_those_of_the_first_time(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    source = ModelSource(whole_tensors(model), rank=0, zero_stage=0, as_stored=as_stored(model))
    (bucket,) = cut_into_buckets(source.metadata(), 10**9)
    source.gather(bucket)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert all((tensor == 3.0).all() for tensor in source.gather(bucket))


def test_a_tensor_that_is_several_in_the_learner_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(HrmTextConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"HrmTextForCausalLM keeps .* of a checkpoint in several tensors"):
        require_separable(model, model.state_dict())
