"""What an update costs: a formula checked against counted matrix products, and how ranks become one number."""

import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from eopd.learner.cost import Cost, flop_per_token
from eopd.runtime.gang import with_costs
from eopd.types import LearnerStats, PolicyVersion

TOKENS = 12


def model(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )


def counted(student: LlamaForCausalLM) -> int:
    """FLOP of linear layers, forward and backward, as torch counts them; bmm is attention, which the formula omits."""
    ids = torch.arange(TOKENS)[None]
    embedded = student.get_input_embeddings()(ids).detach().requires_grad_()  # so that the first layer goes back to it
    with FlopCounterMode(display=False) as counter:
        student(inputs_embeds=embedded).logits.sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(flop for operation, flop in by_operation.items() if "bmm" not in str(operation))


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_is_what_the_matrix_products_take(tied: bool) -> None:
    student = model(tied=tied)
    norms = sum(weight.numel() for name, weight in student.named_parameters() if "norm" in name)
    assert flop_per_token(student) * TOKENS == counted(student) + 6 * norms * TOKENS


def test_frozen_weights_have_no_gradient_to_pay_for() -> None:
    student = model(tied=True)
    trained = flop_per_token(student)
    assert flop_per_token(student.requires_grad_(False)) * 6 == trained * 4


def test_a_rate_becomes_a_utilisation_where_the_peak_is_known() -> None:
    student = model(tied=False)
    row = Cost(student, 1e9).row(num_tokens=100, seconds=2.0)
    assert row["eopd_learner_flops_per_second"] == flop_per_token(student) * 50
    assert row["eopd_learner_mfu_ratio"] == row["eopd_learner_flops_per_second"] / 1e9
    assert "eopd_learner_mfu_ratio" not in Cost(student, None).row(100, 2.0)
    if not torch.cuda.is_available():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert 100e6 < row["eopd_learner_memory_bytes"] <= most  # torch alone takes more


def test_ranks_become_one_number() -> None:
    def of(rate: float, memory: float, loss: float) -> LearnerStats:
        costs = {"eopd_learner_flops_per_second": rate, "eopd_learner_memory_bytes": memory, "eopd_loss": loss}
        return LearnerStats(version=PolicyVersion(0, 1), metrics=costs)

    found = with_costs([of(1.0, 30.0, 7.0), of(2.0, 10.0, 7.0)])
    assert found.metrics == {
        "eopd_learner_flops_per_second": 1.5,
        "eopd_learner_memory_bytes": 30.0,
        "eopd_loss": 7.0,
    }
    assert found.version == PolicyVersion(0, 1)
