"""Which attention the student is loaded with, that a soft-cap in it survives, that
recomputing it drops nothing out.
"""

import itertools

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    MistralConfig,
    VaultGemmaConfig,
)
from transformers.models.doge.modeling_doge import DogeForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from eopd.config import ConfigError, StudentConfig
from eopd.learner import attention
from eopd.learner import student as student_module
from eopd.learner.attention import VARLEN, check_mask, choose_attention
from eopd.learner.student import Student, load_student

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SOFT = {"attn_logit_softcapping": 50.0}


HOPPER, VOLTA = (9, 0), (7, 0)
HEADS = {"hidden_size": 64, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "text_config", "dtype", "capability", "expected"),
    [
        (LlamaForCausalLM, {}, "bfloat16", HOPPER, VARLEN),
        (LlamaForCausalLM, {"attn_logit_softcapping": None}, "bfloat16", HOPPER, VARLEN),
        (LlamaForCausalLM, {"head_dim": 256}, "bfloat16", HOPPER, VARLEN),
        (LlamaForCausalLM, {"head_dim": 512}, "bfloat16", HOPPER, "sdpa"),
        (LlamaForCausalLM, {"head_dim": 36}, "bfloat16", HOPPER, "sdpa"),
        (LlamaForCausalLM, {}, "float32", HOPPER, "sdpa"),
        (LlamaForCausalLM, {}, "bfloat16", VOLTA, "sdpa"),
        (LlamaForCausalLM, {}, "bfloat16", None, "sdpa"),
        # values of another width, and attention within chunks
        (LlamaForCausalLM, {"v_head_dim": 128}, "bfloat16", HOPPER, "sdpa"),
        (LlamaForCausalLM, {"attention_chunk_size": 8192}, "bfloat16", HOPPER, "sdpa"),
        (Gemma2ForCausalLM, SOFT, "bfloat16", HOPPER, "eager"),
        (Gemma2ForCausalLM, SOFT, "float32", None, "eager"),
        (DogeForCausalLM, {}, "bfloat16", HOPPER, "sdpa"),  # without FlashAttention
        # only with other kernels, for its sinks
        (GptOssForCausalLM, {}, "bfloat16", HOPPER, "sdpa"),
        # transformers will say that it knows no such model
        (None, {}, "bfloat16", HOPPER, "sdpa"),
    ],
)
def test_variable_lengths_are_for_half_precision_on_gpus_whose_kernel_can_do_the_model(
    family, text_config, dtype, capability, expected
):
    chosen = choose_attention(family, HEADS | text_config, dtype=dtype, capability=capability)
    assert chosen == expected


def kernel_on_a_cpu(query, key, value, ends, _ends, longest, _longest, *, scale, window_size, **_):
    """What torch's kernel does, sequence by sequence; its own is for GPUs alone."""
    outputs = []
    assert ends.dtype == torch.int32
    assert longest == int(ends.diff().max())

    for start, end in itertools.pairwise(ends.tolist()):
        ahead = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (ahead >= 0) & ((ahead <= window_size[0]) | (window_size[0] < 0))
        states = (part[start:end].transpose(0, 1) for part in (query, key, value))
        outputs.append(
            functional.scaled_dot_product_attention(
                *states, attn_mask=seen, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )

    return torch.cat(outputs)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_the_ends_of_packed_sequences_reach_the_kernel(
    window, activation_checkpointing, tmp_path, monkeypatch
):
    config = MistralConfig(**SIZES | {"num_hidden_layers": 2}, sliding_window=window)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr(attention, "varlen_attn", kernel_on_a_cpu)
    ids, positions = torch.arange(18), torch.cat([torch.arange(n) for n in (1, 10, 7)])
    results = []

    for name in ("sdpa", VARLEN):
        monkeypatch.setattr(student_module, "choose_attention", lambda *_, name=name, **__: name)
        student = load_student(
            StudentConfig(model=tmp_path, dtype="float32"),
            activation_checkpointing=activation_checkpointing,
        )
        hidden = student(ids, positions, lambda hidden_TD, _head: hidden_TD)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden, student.model.get_input_embeddings().weight.grad))

    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def model_with(name):
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES))
    model.config._attn_implementation = name
    return model


def test_a_mask_over_all_tokens_is_said_on_a_gpu_and_refused_when_it_is_large(caplog):
    for name, device in ((VARLEN, "cuda"), ("sdpa", "cpu")):
        check_mask(model_with(name), device=torch.device(device), token_budget=100_000)

    assert not caplog.records
    check_mask(model_with("sdpa"), device=torch.device("cuda"), token_budget=8192)
    assert "learner.token_budget: 8192 tokens" in caplog.text
    assert "0.2 GB" in caplog.text
    with pytest.raises(ConfigError, match="at most 53509 tokens"):
        check_mask(model_with("sdpa"), device=torch.device("cuda"), token_budget=60_000)


@pytest.mark.parametrize("config_class", [Gemma2Config, VaultGemmaConfig])
def test_a_soft_cap_in_the_attention_is_not_dropped(config_class, tmp_path):
    config = config_class(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        attn_logit_softcapping=0.1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    student = load_student(
        StudentConfig(model=tmp_path, dtype="float32"), activation_checkpointing=False
    )

    with torch.no_grad():
        loaded = student.model(input_ids=ids).logits
        eager, sdpa = (
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(
                input_ids=ids
            ).logits
            for name in ("eager", "sdpa")
        )

    assert torch.equal(loaded, eager)
    assert (eager - sdpa).abs().max() > 1e-2  # what would be lost


@pytest.mark.parametrize(
    ("window", "longest"),
    [
        (9, 10),
        (300, 301),
        (4096, 7),
        (None, 7),
    ],
)
def test_packing_is_tried_beyond_the_window_of_the_attention(
    window, longest, tmp_path, monkeypatch
):
    config = MistralConfig(**SIZES, sliding_window=window)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    seen = []
    forward = Student.forward

    def spy(self, ids, positions, use_head):
        seen.append(int(positions.max()) + 1)
        return forward(self, ids, positions, use_head)

    monkeypatch.setattr(Student, "forward", spy)
    load_student(StudentConfig(model=tmp_path, dtype="float32"), activation_checkpointing=False)
    assert max(seen) == longest


def test_layers_that_would_drop_out_when_recomputed_are_refused(tmp_path):
    config = DogeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    student = StudentConfig(model=tmp_path, dtype="float32")
    load_student(student, activation_checkpointing=False)
    with pytest.raises(ValueError, match="drops out activations"):
        load_student(student, activation_checkpointing=True)
