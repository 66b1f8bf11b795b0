"""Which attention the student is loaded with, that a soft-cap in it survives, that
recomputing it drops nothing out.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    MistralConfig,
    NemotronConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    StableLmConfig,
    VaultGemmaConfig,
)

from eopd.config import ConfigError, StudentConfig
from eopd.learner import attention
from eopd.learner.attention import VARLEN, check_mask, choose_attention, may_take_varlen
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
WINDOW = {"sliding_window": 4}


def model_of(config_class, **options):
    return AutoModelForCausalLM.from_config(config_class(**SIZES | options))


@pytest.mark.parametrize(
    ("config_class", "options", "dtype", "capability", "expected"),
    [
        (MistralConfig, {}, "bfloat16", HOPPER, True),
        (MistralConfig, WINDOW, "float16", HOPPER, True),
        (MistralConfig, {"head_dim": 256}, "bfloat16", HOPPER, True),
        (MistralConfig, {"head_dim": 512}, "bfloat16", HOPPER, False),
        (MistralConfig, {"head_dim": 36}, "bfloat16", HOPPER, False),
        (MistralConfig, {"v_head_dim": 128}, "bfloat16", HOPPER, False),
        (MistralConfig, {"attention_chunk_size": 8192}, "bfloat16", HOPPER, False),
        (MistralConfig, {}, "float32", HOPPER, False),
        (MistralConfig, {}, "bfloat16", VOLTA, False),
        (MistralConfig, {}, "bfloat16", None, True),
        (MistralConfig, {"head_dim": 36}, "float32", None, True),
        (DogeConfig, {}, "float32", None, False),
        (Gemma2Config, {"attn_logit_softcapping": None}, "bfloat16", HOPPER, True),
        (PhimoeConfig, WINDOW, "bfloat16", HOPPER, False),  # tells its mask alone
        (PhimoeConfig, {"sliding_window": None}, "bfloat16", HOPPER, True),
        (DogeConfig, {}, "bfloat16", HOPPER, False),  # takes no FlashAttention
        (GptOssConfig, {}, "bfloat16", HOPPER, False),  # only kernels that know its sinks
    ],
)
def test_attention_goes_by_sequences_on_cpus_and_on_gpus_whose_kernel_can_do_the_model(
    config_class, options, dtype, capability, expected
):
    model = model_of(config_class, **options)
    assert may_take_varlen(model, dtype=dtype, capability=capability) is expected


def test_a_soft_capped_attention_is_eager():
    assert choose_attention(SOFT) == "eager"
    assert choose_attention({"attn_logit_softcapping": None}) == "sdpa"
    assert choose_attention({}) == "sdpa"


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (4, (3, 0))])
def test_a_gpu_gets_torch_s_kernel_for_whole_packs(window, expected, monkeypatch):
    def kernel(query, key, value, ends, _ends, longest, _longest, *, scale, window_size, **_):
        assert query.shape == (6, 4, 8)
        assert key.shape == value.shape == (6, 2, 8)
        assert (ends.dtype, ends.tolist(), longest) == (torch.int32, [0, 4, 6], 4)
        assert (scale, window_size) == (0.3, expected)
        return query

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key = (torch.empty(1, heads, 6, 8, device="meta") for heads in (4, 2))
    ends = {
        "cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32),
        "max_length_q": 4,
    }
    output, _ = attention.varlen_attention(
        None, query, key, key, None, scaling=0.3, sliding_window=window, **ends
    )
    assert output.shape == (1, 6, 4, 8)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config_class", "options", "expected"),
    [
        (MistralConfig, {"sliding_window": None}, VARLEN),
        (MistralConfig, WINDOW, VARLEN),
        (Cohere2Config, WINDOW, VARLEN),  # windows in some layers alone
        (Gemma3TextConfig, WINDOW | {"head_dim": 32}, VARLEN),
        (GraniteConfig, {"attention_multiplier": 0.3}, VARLEN),  # a scale of its own
        (PhimoeConfig, WINDOW, "sdpa"),
        (Qwen2MoeConfig, WINDOW | {"use_sliding_window": True, "max_window_layers": 0}, "sdpa"),
        # their layers do not hand on where sequences end
        (StableLmConfig, {}, "sdpa"),
        (NemotronConfig, {}, "sdpa"),
    ],
)
def test_a_model_attends_by_sequences_where_that_changes_nothing(
    config_class, options, expected, activation_checkpointing, tmp_path
):
    torch.manual_seed(0)
    model_of(config_class, **{"num_hidden_layers": 2} | options).save_pretrained(tmp_path)
    student = load_student(
        StudentConfig(model=tmp_path, dtype="float32"),
        activation_checkpointing=activation_checkpointing,
    )
    assert student.model.config._attn_implementation == expected

    ids, positions = torch.arange(18), torch.cat([torch.arange(n) for n in (1, 10, 7)])
    results = []

    for _ in range(2):
        hidden = student(ids, positions, lambda hidden_TD, _head: hidden_TD)
        weight = student.model.get_input_embeddings().weight
        weighed = hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        (gradient,) = torch.autograd.grad(weighed.sum(), [weight])
        results.append((hidden, gradient))
        student.model.set_attn_implementation("sdpa")

    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() < 1e-5 * exact.norm()


def test_attention_to_all_pairs_is_said_on_a_gpu_and_refused_when_it_is_large(caplog):
    model = model_of(MistralConfig)
    check_mask(model, device=torch.device("cpu"), token_budget=100_000)
    model.config._attn_implementation = VARLEN
    check_mask(model, device=torch.device("cuda"), token_budget=100_000)
    assert not caplog.records

    model.config._attn_implementation = "sdpa"
    check_mask(model, device=torch.device("cuda"), token_budget=8192)
    assert "all pairs of 8192 tokens takes 0.34 GB" in caplog.text
    with pytest.raises(ConfigError, match="at most 41448 tokens"):
        check_mask(model, device=torch.device("cuda"), token_budget=60_000)

    model.config._attn_implementation = "eager"
    check_mask(model, device=torch.device("cuda"), token_budget=8192)
    assert "all pairs of 8192 tokens takes 1.1 GB" in caplog.text


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
