"""Which attention the student is loaded with, that a soft-cap in it survives, that
recomputing it drops nothing out.
"""

import pytest
import torch
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

from eopd.config import StudentConfig
from eopd.learner.student import Student, choose_attention, load_student

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SOFT = {"attn_logit_softcapping": 50.0}


@pytest.mark.parametrize(
    ("family", "text_config", "dtype", "device_type", "flash_installed", "expected"),
    [
        (LlamaForCausalLM, {}, "bfloat16", "cuda", True, "flash_attention_2"),
        (
            LlamaForCausalLM,
            {"attn_logit_softcapping": None},
            "bfloat16",
            "cuda",
            True,
            "flash_attention_2",
        ),
        (LlamaForCausalLM, {}, "float32", "cuda", True, "sdpa"),
        (LlamaForCausalLM, {}, "bfloat16", "cpu", True, "sdpa"),
        (LlamaForCausalLM, {}, "bfloat16", "cuda", False, "sdpa"),
        (Gemma2ForCausalLM, SOFT, "bfloat16", "cuda", True, "eager"),
        (Gemma2ForCausalLM, SOFT, "float32", "cpu", False, "eager"),
        (DogeForCausalLM, {}, "bfloat16", "cuda", True, "sdpa"),  # without FlashAttention
        # only with other kernels, for its sinks
        (GptOssForCausalLM, {}, "bfloat16", "cuda", True, "sdpa"),
        # transformers will say that it knows no such model
        (None, {}, "bfloat16", "cuda", True, "sdpa"),
    ],
)
def test_flash_is_for_half_precision_on_gpus_without_a_soft_cap(
    family, text_config, dtype, device_type, flash_installed, expected
):
    chosen = choose_attention(
        family,
        text_config,
        dtype=dtype,
        device_type=device_type,
        flash_installed=flash_installed,
    )
    assert chosen == expected


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
