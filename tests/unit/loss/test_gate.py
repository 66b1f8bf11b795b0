"""Every gate on numbers small enough to check by eye."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eopd.config.loss import AlwaysGate, HardGate, NeverGate, QuantileGate, RandomGate, SigmoidGate
from eopd.loss.gate import (
    GateError,
    custom_gate,
    gate_weights,
    quantile_threshold,
    random_draws,
)
from eopd.plugins import GateTokens
from eopd.types import TrajectoryKey

ENTROPY = torch.tensor([0.1, 2.0, 0.8, 0.5, 1.0])


def test_gates_by_hand():
    assert gate_weights(ENTROPY, HardGate(tau=0.75)).tolist() == [0, 1, 1, 0, 1]
    assert gate_weights(ENTROPY, HardGate(tau=1.0)).tolist() == [0, 1, 0, 0, 0]  # above, not at
    assert gate_weights(ENTROPY, AlwaysGate()).tolist() == [1] * 5
    assert gate_weights(ENTROPY, NeverGate()).tolist() == [0] * 5
    assert gate_weights(
        ENTROPY,
        QuantileGate(top=0.4),
        threshold=1.0,
    ).tolist() == [0, 1, 0, 0, 1]
    draws = torch.tensor([0.0, 0.3, 0.29, 0.9, 0.1], dtype=torch.float64)
    assert gate_weights(
        ENTROPY,
        RandomGate(rate=0.3),
        draws_T=draws,
    ).tolist() == [1, 0, 1, 0, 1]
    sigmoid = gate_weights(ENTROPY, SigmoidGate(tau=0.8, scale=0.2)).tolist()
    assert sigmoid == pytest.approx(
        [1 / (1 + math.exp(-(h - 0.8) / 0.2)) for h in ENTROPY.tolist()], rel=1e-5
    )


def tokens(entropy: torch.Tensor) -> GateTokens:
    zeros = torch.zeros(len(entropy))
    return GateTokens(
        teacher_entropy=entropy,
        teacher_logprobs=zeros,
        teacher_topk_logprobs=zeros[:, None],
        teacher_tail_logprobs=zeros,
        rollout_logprobs=-entropy,
        loss_mask=torch.ones(len(entropy), dtype=torch.bool),
    )


def test_a_custom_gate_is_what_the_function_says():
    def unsure_and_surprised(read):
        return ((read.teacher_entropy > 0.7) & (read.rollout_logprobs < -0.9)).double()

    counted = torch.tensor([True, True, True, True, False])
    gate = custom_gate("my:gate", unsure_and_surprised, tokens(ENTROPY), counted)

    assert gate.tolist() == [0, 1, 0, 0, 0]
    assert gate.dtype == torch.float32


def test_a_gate_that_works_in_place_changes_nothing_else():
    def narrow(read):
        entropy = read.teacher_entropy
        entropy -= 0.7
        read.rollout_logprobs.exp_()
        read.loss_mask.zero_()
        return (entropy > 0).float()

    given = tokens(ENTROPY.clone())
    gate = custom_gate("my:gate", narrow, given, torch.ones(5).bool())

    assert gate.tolist() == (ENTROPY > 0.7).float().tolist()
    assert given.teacher_entropy.tolist() == ENTROPY.tolist()
    assert given.rollout_logprobs.tolist() == (-ENTROPY).tolist()
    assert given.loss_mask.all()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda read: 1 / 0, "my:gate: raised ZeroDivisionError: division by zero"),
        (lambda read: [0.5] * 5, "my:gate: returned list; it must be a tensor"),
        (lambda read: read.loss_mask[1:], r"returned a tensor of \[4\] for 5 tokens"),
        (lambda read: read.teacher_entropy, "returned 0.1 to 2; a gate is from 0 to 1"),
        (lambda read: read.teacher_entropy * math.nan, "returned what is no finite number"),
    ],
)
def test_what_is_no_gate_is_refused_with_the_name_of_the_function(function, words):
    with pytest.raises(GateError, match=r"^loss\.gate\.function: my:gate: .*") as caught:
        custom_gate("my:gate", function, tokens(ENTROPY), torch.ones(5).bool())

    assert re.search(words, str(caught.value))


def test_where_numbers_are_missing_the_custom_gate_is_not_asked_to_be_one():
    entropy = torch.tensor([0.5, math.nan])
    counted = entropy.isfinite()
    gate = custom_gate(
        "my:gate",
        lambda read: read.teacher_entropy,
        tokens(entropy),
        counted,
    )
    assert gate.tolist() == [0.5, 0.0]


def test_sharp_sigmoids_do_not_overflow():
    gate = gate_weights(torch.tensor([0.0, 12.0]), SigmoidGate(tau=0.8, scale=1e-4))
    assert gate.tolist() == [0.0, 1.0]


def test_gates_that_need_more_say_so():
    with pytest.raises(ValueError, match="threshold"):
        gate_weights(ENTROPY, QuantileGate())

    with pytest.raises(ValueError, match="draw"):
        gate_weights(ENTROPY, RandomGate())


@given(
    st.lists(
        st.integers(0, 10_000),
        min_size=1,
        max_size=60,
        unique=True,
    ),
    st.floats(0.01, 1.0),
)
def test_quantile_opens_the_asked_share(values, top):
    entropies = torch.tensor(values, dtype=torch.float32)
    threshold = quantile_threshold(entropies, top)
    open_gates = gate_weights(entropies, QuantileGate(top=top), threshold=threshold)
    expected = max(1, round(top * len(values)))
    assert open_gates.sum() == expected
    assert sorted(entropies[open_gates.bool()].tolist()) == sorted(values)[-expected:]


def test_quantile_over_no_tokens_opens_nothing():
    assert quantile_threshold(torch.empty(0), 0.5) == math.inf


def test_draws_depend_on_the_name_alone():
    key = TrajectoryKey(1, "prompt", 0)
    draws = random_draws(7, key, 50)
    assert (random_draws(7, key, 20) == draws[:20]).all()
    others = [
        (8, key),
        (7, key._replace(epoch=2)),
        (7, key._replace(prompt_id="x")),
        (7, key._replace(sample_index=1)),
    ]
    others += [
        (71, key._replace(epoch=0)),
        (7, TrajectoryKey(10, "prompt", 0)),
        (7, TrajectoryKey(1, "0prompt", 0)),
    ]
    assert all((random_draws(seed, other, 50) != draws).all() for seed, other in others)
    assert random_draws(7, key, 0).shape == (0,)


def test_draws_are_uniform():
    draws = random_draws(0, TrajectoryKey(0, "p", 0), 20_000)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = torch.histc(draws, 10, 0.0, 1.0)
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    assert gate_weights(
        draws,
        RandomGate(rate=0.2),
        draws_T=draws,
    ).mean().item() == pytest.approx(0.2, abs=0.015)
