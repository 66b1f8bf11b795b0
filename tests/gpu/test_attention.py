"""The forward and backward pass of packed rows on a GPU, beside each sequence alone."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eopd.config import StudentConfig
from eopd.learner.attention import VARLEN
from eopd.learner.student import load_student

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
}
LENGTHS = (1, 200, 77, 512)
MODELS = {
    "grouped heads": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "a window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=50)),
}


def load(directory, dtype):
    student = StudentConfig(model=directory, dtype=dtype)
    return load_student(student, activation_checkpointing=False, device="cuda")


def run(student, ids, positions):
    """Hidden states, and the gradient of a weight below the attention."""
    hidden = student(ids, positions, lambda hidden_TD, _head: hidden_TD)
    weighed = hidden.float() * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)
    weight = student.model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(weighed.sum(), [weight])
    return hidden.detach().double(), gradient.double()


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_are_what_each_is_alone(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path)
    half, full = load(tmp_path, "bfloat16"), load(tmp_path, "float32")
    assert half.model.config._attn_implementation == VARLEN
    assert full.model.config._attn_implementation == "sdpa"

    ids = torch.randint(1000, (sum(LENGTHS),), device="cuda")
    positions = torch.cat([torch.arange(length, device="cuda") for length in LENGTHS])
    packed, gradient = run(half, ids, positions)
    exact, exact_gradient = run(full, ids, positions)
    alone = torch.cat(
        [run(half, part, torch.arange(len(part), device="cuda"))[0] for part in ids.split(LENGTHS)]
    )

    assert (packed - alone).norm() < 1e-2 * alone.norm()
    half.model.set_attn_implementation("sdpa")
    masked, masked_gradient = run(half, ids, positions)
    assert (packed - exact).norm() < 1.2 * (masked - exact).norm()
    assert (gradient - exact_gradient).norm() < 1.2 * (masked_gradient - exact_gradient).norm()


def test_time_does_not_grow_with_the_square_of_the_micro_batch(tmp_path):
    MODELS["grouped heads"]().save_pretrained(tmp_path)
    student, seconds = load(tmp_path, "bfloat16"), []

    for sequences in (16, 64):
        ids = torch.randint(1000, (sequences * 512,), device="cuda")
        positions = torch.arange(512, device="cuda").repeat(sequences)
        run(student, ids, positions)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run(student, ids, positions)

        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end))

    assert seconds[1] < 8 * seconds[0]  # 16 with a mask
