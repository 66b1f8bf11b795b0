"""A step of the learner on a GPU, in bfloat16, beside the same one in float32."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

pytest.importorskip("deepspeed")

import numpy as np
from bench_learner import make_scored, our_step
from transformers import Qwen3Config, Qwen3ForCausalLM

from eopd.packing import pack_batch

VOCABULARY = 1000


def test_a_step_in_bfloat16_is_that_in_float32(tmp_path):
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    batch = [make_scored(rng, index, 20, 100, VOCABULARY) for index in range(4)]
    packed = pack_batch(batch, steps=1, ranks=1, token_budget=300, alpha=1.0)
    half, full = (
        our_step(tmp_path, dtype, stage, 2, packed)().metrics
        for dtype, stage in (("bfloat16", 1), ("float32", 0))
    )

    for name in ("eopd_loss", "eopd_reverse_kl_nats", "eopd_grad_norm"):
        assert half[name] == pytest.approx(full[name], rel=0.03)

    assert torch.cuda.max_memory_allocated() > 0
