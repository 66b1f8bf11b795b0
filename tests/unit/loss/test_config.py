"""The objective's YAML: every form can be written, no impossible pair can."""

import pytest
from pydantic import ValidationError

from eopd.config import LossConfig
from eopd.config.loss import (
    HardGate,
    NoReverseKl,
    QuantileGate,
    RandomGate,
    RenormalizedForwardKl,
    SampledReverseKl,
    SigmoidGate,
    TailForwardKl,
    TopkTailReverseKl,
)


def test_the_default_is_the_paper():
    config = LossConfig()
    assert (config.top_k, config.alpha) == (16, 1.0)
    assert config.gate == HardGate(tau=0.8)
    assert config.forward_kl == RenormalizedForwardKl()
    assert config.reverse_kl == SampledReverseKl(clip=0.2, importance_cap=2.0)


@pytest.mark.parametrize(
    ("part", "value", "section"),
    [
        ("gate", {"kind": "quantile", "top": 0.3}, QuantileGate(top=0.3)),
        ("gate", {"kind": "sigmoid", "tau": 0.4, "scale": 0.2}, SigmoidGate(tau=0.4, scale=0.2)),
        ("gate", {"kind": "random", "rate": 0.15}, RandomGate(rate=0.15)),
        ("forward_kl", {"kind": "tail"}, TailForwardKl()),
        ("reverse_kl", {"kind": "topk_tail"}, TopkTailReverseKl()),
        ("reverse_kl", {"kind": "none"}, NoReverseKl()),
    ],
)
def test_forms_by_kind(part, value, section):
    config = LossConfig.model_validate({part: value})
    assert getattr(config, part) == section
    assert LossConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("reverse_kl", {"kind": "topk_tail", "clip": 0.2}),
        ("reverse_kl", {"kind": "none", "importance_cap": 2.0}),
        ("forward_kl", {"kind": "tail", "tau": 0.8}),
        ("gate", {"kind": "hard", "top": 0.2}),
        ("gate", {"kind": "random", "tau": 0.8}),
        ("gate", {"kind": "quantile", "top": 0.0}),
        ("gate", {"kind": "quantile", "top": 1.1}),
        ("gate", {"kind": "sigmoid", "scale": 0.0}),
        ("gate", {"kind": "random", "rate": -0.1}),
        ("gate", {"kind": "entropy"}),
        ("gate", {"tau": 0.8}),
    ],
)
def test_impossible_pairs_cannot_be_written(part, value):
    with pytest.raises(ValidationError):
        LossConfig.model_validate({part: value})


def test_alpha_warms_up_linearly():
    config = LossConfig.model_validate(
        {"alpha": 2.0, "alpha_warmup": {"start": 0.25, "batches": 4}}
    )
    assert [config.alpha_at(batch) for batch in (0, 1, 2, 4, 9)] == [0.5, 0.875, 1.25, 2.0, 2.0]
    assert LossConfig().alpha_at(0) == 1.0
