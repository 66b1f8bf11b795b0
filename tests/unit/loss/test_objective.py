"""The objective against the oracle: value, gradients and metrics of every combination."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.config import LossConfig
from eopd.loss.chunked import Head
from eopd.loss.gate import gate_weights, quantile_threshold, random_draws
from eopd.loss.objective import LossTerms, token_statistics
from eopd.types import TrajectoryKey

FORWARD = ("renormalized", "tail", "truncated")
REVERSE = ("sampled", "topk_tail", "none")
GATES = ("hard", "quantile", "sigmoid", "random", "always", "never")


def config(forward="tail", reverse="sampled", gate="hard"):
    return LossConfig.model_validate(
        {"forward_kl": {"kind": forward}, "reverse_kl": {"kind": reverse}, "gate": {"kind": gate}}
    )


def gated(case, loss_config):
    """The case with the gate its config asks for."""
    tokens = case.tokens
    threshold = quantile_threshold(tokens.teacher_entropy_T[tokens.loss_mask_T], 0.2)
    draws = random_draws(0, TrajectoryKey(0, "p", 0), len(tokens.loss_mask_T))
    gate = gate_weights(
        tokens.teacher_entropy_T, loss_config.gate, threshold=threshold, draws_T=draws
    )
    return case.with_tokens(gate_T=gate)


def assert_same(ours, theirs, tolerance=1e-11):
    torch.testing.assert_close(
        ours.loss.double(),
        theirs.loss,
        rtol=tolerance,
        atol=tolerance,
    )
    for one, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert one.isfinite().all()
        worst = (one.double() - other.double()).abs().max().item() if other.numel() else 0.0
        assert worst <= tolerance * max(1.0, other.abs().max().item() if other.numel() else 0.0)

    assert ours.metrics == pytest.approx(
        theirs.metrics,
        rel=tolerance * 10,
        abs=tolerance * 10,
    )


@pytest.mark.parametrize(
    ("gate", "forward", "reverse"), list(itertools.product(GATES, FORWARD, REVERSE))
)
def test_every_combination(gate, forward, reverse, case, run, oracle):
    loss_config = config(forward, reverse, gate)
    for old in (False, True):
        random = gated(case(3, t=9, old=old, bonus=old, bias=old), loss_config)
        assert_same(
            run(
                random,
                loss_config,
                alpha=0.7,
            )[0],
            oracle(random, loss_config, alpha=0.7),
        )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_size_and_head(data, case, run, oracle):
    draw = data.draw
    v = draw(st.integers(1, 12))
    random = case(
        draw(st.integers(0, 10_000)),
        t=draw(st.integers(0, 8)),
        v=v,
        d=draw(st.integers(1, 4)),
        k=draw(st.integers(1, v)),
        scale=draw(st.sampled_from([1.0, 0.25])),
        softcap=draw(st.sampled_from([None, 1.5])),
        temperature=draw(st.sampled_from([1.0, 0.6])),
        bias=draw(st.booleans()),
        old=draw(st.booleans()),
        bonus=draw(st.booleans()),
    )
    loss_config = config(draw(st.sampled_from(FORWARD)), draw(st.sampled_from(REVERSE)))
    chunk, alpha = draw(st.integers(1, 9)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    assert_same(
        run(random, loss_config, alpha=alpha, chunk_tokens=chunk)[0],
        oracle(random, loss_config, alpha=alpha),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype, case, run, oracle):
    """float32 inside: value as good as float32, gradients as good as the dtype they are
    returned in.
    """
    for seed, scale in ((0, 1.0), (1, 0.5)):
        wide = case(
            seed, t=40, v=300, d=16, k=8, bias=True, scale=scale, softcap=3.0, temperature=0.8
        )
        narrow = replace(
            wide,
            hidden=wide.hidden.to(dtype),
            weight=wide.weight.to(dtype),
            bias=wide.bias.to(dtype),
        )
        ours, _ = run(narrow, config(), chunk_tokens=16)
        theirs = oracle(narrow, config())
        assert ours.loss.dtype == torch.float32
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=2e-6)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5, abs=1e-6)

        for one, other in zip(ours.gradients, theirs.gradients, strict=True):
            assert one.dtype == dtype
            error = (one.double() - other.double()).abs().max() / other.double().abs().max()
            assert error < (4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5)


def test_operands_of_two_dtypes(case, run, oracle):
    wide = case(0, t=20, v=50, d=8, k=4)
    mixed = replace(wide, hidden=wide.hidden.float(), weight=wide.weight.bfloat16())
    ours, theirs = run(mixed, config())[0], oracle(mixed, config())
    assert [g.dtype for g in ours.gradients] == [torch.float32, torch.bfloat16]
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=2e-6)
    torch.testing.assert_close(
        ours.gradients[0].double(), theirs.gradients[0].double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("reverse", REVERSE)
def test_nearly_certain_rows_in_float32(forward, reverse, case, signal, run, oracle):
    """V = 49,152, the masses of teacher and student on the candidates within 1e-7 of 1: 1 - P
    would be 0 or noise.
    """
    t, v, d, k = 6, 49_152, 64, 8
    g = torch.Generator().manual_seed(5)
    # Multiples of 1/8, so that float32 logits are exact in whatever order a machine adds up: rows
    # this certain feel the rounding of a logit of 60 in full.
    head = torch.randn(v, d, generator=g).mul(4.0).round() / 8
    hidden = (head[:t] * torch.linspace(3.0, 4.0, t)[:, None]).mul(8.0).round() / 8
    logits = hidden @ head.T + 0.3 * torch.randn(t, v, generator=g)
    targets = torch.tensor([0, 1, 2, 3, 40_000, 5])
    random = case(0, t=t)
    random = replace(random, hidden=hidden, weight=head).with_tokens(
        target_ids_T=targets,
        loss_mask_T=torch.ones(t, dtype=torch.bool),
        gate_T=torch.ones(t),
        **signal(logits, k, targets),
    )
    ours, theirs = (
        run(random, config(forward, reverse), num=1)[0],
        oracle(random, config(forward, reverse), num=1),
    )
    assert 0.0 < 1.0 - theirs.metrics["eopd_teacher_topk_mass_ratio"] < 1e-7
    assert 0.0 < 1.0 - theirs.metrics["eopd_student_topk_mass_ratio"] < 1e-7
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=2e-5)
    for one, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_finite_differences(case, run):
    random, loss_config, step = (
        case(11, t=6, softcap=2.0, bias=True, old=True),
        config("tail", "sampled"),
        1e-6,
    )
    gradients = run(random, loss_config)[0].gradients

    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
        for i in range(gradient.numel()):
            shift = torch.zeros(gradient.numel(), dtype=torch.float64)
            shift[i] = step
            shift = shift.view(gradient.shape)
            up, down = (
                run(replace(random, **{name: getattr(random, name) + sign * shift}), loss_config)[
                    0
                ].loss
                for sign in (1, -1)
            )
            assert gradient.flatten()[i].item() == pytest.approx(
                (up - down).item() / (2 * step), rel=1e-5, abs=1e-8
            )


def test_terms_survive_the_wire(case, run):
    one = run(case(0), config())[1]
    assert one.vector().dtype == torch.float64
    assert one.vector().shape == (len(fields(LossTerms)),)
    again = LossTerms.from_vector(one.vector())
    assert again.metrics(5) == one.metrics(5)
    assert again.topk_overlap == one.topk_overlap
    assert not any(getattr(one, field.name).requires_grad for field in fields(LossTerms))


def test_entropy_is_a_diagnostic_only(case, run):
    random = case(0)
    with_entropy, without = (
        run(random, config())[0],
        run(random.with_tokens(teacher_entropy_T=torch.zeros(7)), config())[0],
    )
    assert with_entropy.loss == without.loss
    assert without.metrics["eopd_teacher_entropy_nats"] == 0.0


def test_num_loss_tokens_must_count(case, run):
    with pytest.raises(ValueError, match="num_loss_tokens is 0"):
        run(case(0), config(), num=0)


@pytest.mark.parametrize(
    "head", [{}, {"scale": 0.5, "softcap": 2.0, "temperature": 0.7, "bias": True}]
)
def test_token_statistics(head, case):
    random = case(8, t=12, v=14, k=5, **head)
    found = token_statistics(
        random.hidden, random.head(random.weight, random.bias), random.tokens, chunk_tokens=4
    )
    logits = random.hidden @ random.weight.T * random.scale + (
        0.0 if random.bias is None else random.bias
    )
    logits = logits if random.softcap is None else random.softcap * (logits / random.softcap).tanh()
    log_p, tokens = (logits / random.temperature).log_softmax(-1), random.tokens

    for t in range(12):
        row = found[:, t].tolist()
        if not tokens.loss_mask_T[t]:
            assert row == [0.0] * 7
            continue

        ids, rest = tokens.teacher_topk_ids_TK[t], log_p[t].clone()
        rest[ids] = -torch.inf
        log_q, log_rest = tokens.teacher_topk_logprobs_TK[t], tokens.teacher_tail_logprobs_T[t]
        kl = (log_q.exp() * (log_q - log_p[t, ids])).sum() + log_rest.exp() * (
            log_rest - rest.logsumexp(0)
        )
        sampled = log_p[t, tokens.target_ids_T[t]]
        expected = [
            sampled,
            sampled - tokens.teacher_logprobs_T[t],
            kl,
            -(log_p[t].exp() * log_p[t]).sum(),
            tokens.teacher_entropy_T[t],
            log_p[t].argmax() == ids[0],
            1.0,
        ]
        assert row == pytest.approx([float(x) for x in expected])


def test_top1_agreement_needs_equal_argmax(case):
    """Also after an end token was merged: then the candidates are no longer sorted."""
    student = torch.tensor(
        [[0.0, 9.0, 1.0, 2.0], [9.0, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 9.0]], dtype=torch.float64
    )
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    logprobs = torch.tensor([[0.2, 0.7], [0.2, 0.7], [0.2, 0.7]], dtype=torch.float64).log()
    base = case(0, t=3, v=4, k=2).with_tokens(
        loss_mask_T=torch.ones(3, dtype=torch.bool),
        teacher_topk_ids_TK=ids,
        teacher_topk_logprobs_TK=logprobs,
    )
    head = Head(weight_VD=torch.eye(4, dtype=torch.float64))
    *_, agreement_T, _ = token_statistics(student, head, base.tokens)
    assert agreement_T.tolist() == [1.0, 1.0, 0.0]


def test_old_logprobs_of_the_same_weights_give_ratio_one(case, run):
    """The pass without gradient reads bit-equal numbers, so a first optimiser step is neither
    clipped nor moved.
    """
    random = case(5, t=20, v=30, d=8)
    random = replace(random, hidden=random.hidden.float(), weight=random.weight.float())
    head = random.head(random.weight)
    old = token_statistics(random.hidden, head, random.tokens)[0]
    with_old, without = run(random.with_tokens(old_logprobs_T=old), config()), run(random, config())
    assert with_old[0].loss.item() == pytest.approx(without[0].loss.item(), rel=1e-6)
    torch.testing.assert_close(with_old[0].gradients, without[0].gradients)
    assert with_old[0].metrics["eopd_clipped_ratio"] == 0.0
