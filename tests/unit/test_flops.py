"""What an update costs: a formula checked against counted matrix products, and how ranks
become one number.
"""

import resource

import fakes
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eopd.learner.flops import Cost, Flop
from eopd.metrics import reduce
from eopd.types import Header

TOKENS, PROMPT = 12, 5
LOSS_TOKENS = TOKENS - PROMPT
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_implementation": "eager",
}


def model(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            intermediate_size=24,
            tie_word_embeddings=tied,
        )
    )


def header(prompt: int = PROMPT, response: int = LOSS_TOKENS) -> Header:
    return fakes.header(num_prompt=prompt, num_response=response)


def counted(student: PreTrainedModel) -> float:
    """FLOP forward and backward as torch counts them, the head on loss tokens alone; eager
    attention computes the pairs with later tokens too, which the formula leaves out.
    """
    ids = torch.arange(TOKENS)[None]
    # so that the first layer goes back to it
    embedded = student.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        hidden = student.base_model(inputs_embeds=embedded).last_hidden_state
        student.get_output_embeddings()(hidden[:, PROMPT:]).sum().backward()

    by_operation = counter.get_flop_counts()["Global"]

    return sum(
        flop / 2 if "bmm" in str(operation) else flop for operation, flop in by_operation.items()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_is_what_the_matrix_products_take(tied: bool) -> None:
    student = model(tied=tied)
    norms = sum(weight.numel() for name, weight in student.named_parameters() if "norm" in name)
    assert Flop(student)(header()) == counted(student) + 6 * norms * TOKENS


def test_experts_cost_where_tokens_are_sent_to_them() -> None:
    sizes = {
        **SIZES,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 8,
    }
    sparse = Flop(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=2)))(header())
    dense = Flop(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=8)))(header())
    of_an_expert = 6 * 3 * 16 * 24 * TOKENS * 2  # three matrices, two layers
    assert dense - sparse == pytest.approx(6 * of_an_expert)


def test_frozen_weights_have_no_gradient_to_pay_for() -> None:
    student = model(tied=True)
    trained = Flop(student)(header())
    attention = 6 * 2 * 16 * TOKENS**2
    frozen = Flop(student.requires_grad_(False))(header())
    assert (frozen - attention) * 6 == (trained - attention) * 4


def test_a_rate_becomes_a_utilisation_where_the_peak_is_known() -> None:
    student = model(tied=False)
    row = reduce([Cost(student, 1e9).metrics([header(), header(3, 4)], seconds=2.0)])
    assert (
        row["eopd_learner_flops_per_second"]
        == (Flop(student)(header()) + Flop(student)(header(3, 4))) / 2
    )
    assert row["eopd_learner_mfu_ratio"] == row["eopd_learner_flops_per_second"] / 1e9
    assert "eopd_learner_mfu_ratio" not in Cost(student, None).metrics([header()], 2.0)
    if not torch.cuda.is_available():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert 100e6 < row["eopd_learner_memory_bytes"] <= most  # torch alone takes more


def test_ranks_become_one_number() -> None:
    """The mean of their rates, and the most memory."""
    student = model(tied=False)
    slow, fast = (Cost(student, 1e9).metrics([header()], seconds) for seconds in (4.0, 2.0))
    found, alone = reduce([slow, fast]), reduce([slow])
    for name in ("eopd_learner_flops_per_second", "eopd_learner_mfu_ratio"):
        assert found[name] == pytest.approx(1.5 * alone[name])

    memory = "eopd_learner_memory_bytes"
    assert found[memory] == reduce([fast])[memory] >= alone[memory]
