"""What the gradients must be, from closed forms, and what they must not be: the losses known
to be wrong.
"""

from dataclasses import replace

import pytest
import torch

from eopd.config import LossConfig
from eopd.config.loss import RenormalizedForwardKl, TruncatedForwardKl
from eopd.loss.objective import forward_kl

FORWARD = ("renormalized", "tail", "truncated")


def config(forward="tail", reverse="none", **options):
    return LossConfig.model_validate(
        {"forward_kl": {"kind": forward}, "reverse_kl": {"kind": reverse, **options}}
    )


def on_logits(case, signal, student, teacher, *, k, targets=None):
    """A case whose hidden states are the student's logits: gradients by hidden states are
    those by logits.
    """
    t, v = student.shape
    targets = torch.zeros(t, dtype=torch.long) if targets is None else targets
    base = replace(
        case(0, t=t, v=v, k=k),
        hidden=student,
        weight=torch.eye(v, dtype=student.dtype),
    )

    return base.with_tokens(
        loss_mask_T=torch.ones(t, dtype=torch.bool),
        gate_T=torch.ones(t, dtype=torch.float64),
        target_ids_T=targets,
        **signal(teacher, k, targets),
    )


def two_models(t=5, v=9):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(t, v, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("k", [1, 4])
def test_closed_form_of_the_tail_gradient(k, case, signal, run):
    """p_j - q_j on the candidates, p_j (m - P) / (1 - P) off them."""
    student, teacher = two_models()
    gradient = run(
        on_logits(case, signal, student, teacher, k=k),
        config(),
        num=1,
    )[0].gradients[0]
    p, q = student.softmax(-1), teacher.softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(
        1,
        teacher.topk(k).indices,
        True,
    )
    mass_q, mass_p = (q * inside).sum(1, keepdim=True), (p * inside).sum(1, keepdim=True)
    torch.testing.assert_close(
        gradient, torch.where(inside, p - q, p * (mass_q - mass_p) / (1 - mass_p))
    )


def test_closed_form_of_the_tail_gradient_where_float32_has_no_room(case, signal, run):
    """Masses within 1e-9 of 1: off the candidates the gradient is 1e-10 and still right to
    six digits.
    """
    teacher = torch.tensor([[30.0, 28.0, 5.0, 4.0, 3.0]])
    student = torch.tensor([[30.0, 29.0, 6.0, 3.0, 2.0]])
    gradient = (
        run(on_logits(case, signal, student, teacher, k=2), config(), num=1)[0]
        .gradients[0][0]
        .double()
    )
    p, q = student.double().softmax(-1)[0], teacher.double().softmax(-1)[0]
    closed = torch.cat([(p - q)[:2], p[2:] * (p[2:].sum() - q[2:].sum()) / p[2:].sum()])
    torch.testing.assert_close(gradient, closed, rtol=2e-6, atol=0.0)


def test_a_nearly_certain_sampled_candidate_keeps_its_gradient(case, signal, run):
    """d/dz_y of -w A log p(y) is -w A (1 - p_y): with 1 - p_y = 7e-7 it is right to six
    digits in float32.
    """
    student = torch.tensor([[15.0, 0.0, -0.5, -1.0, -1.5, -2.0]])
    one = on_logits(case, signal, student, 0.5 * student, k=3)
    gradient = (
        run(
            one,
            config(reverse="sampled"),
            alpha=0.0,
            num=1,
        )[0]
        .gradients[0][0]
        .double()
    )
    log_p, log_q = student.double().log_softmax(-1)[0], (0.5 * student).double().log_softmax(-1)[0]
    weight = (log_p[0] - one.tokens.rollout_logprobs_T[0].double()).exp().clamp(max=2.0)
    others = log_p[1:].exp()
    closed = -weight * (log_q[0] - log_p[0]) * torch.cat([others.sum()[None], -others])
    torch.testing.assert_close(gradient, closed, rtol=2e-6, atol=0.0)


def test_the_teacher_is_stationary_for_tail_only(case, signal, run):
    _, teacher = two_models()
    same = on_logits(case, signal, teacher, teacher, k=4)
    gradients = {
        f: run(
            same,
            config(f),
            num=1,
        )[0]
        .gradients[0]
        .abs()
        .max()
        .item()
        for f in FORWARD
    }
    assert gradients["tail"] < 1e-14
    assert gradients["renormalized"] > 0.01
    assert gradients["truncated"] > 0.01
    assert (
        run(
            same,
            config("tail", "topk_tail"),
            num=1,
        )[0]
        .gradients[0]
        .abs()
        .max()
        < 1e-14
    )


def test_sampled_reverse_kl_in_expectation_is_the_full_kl(case, signal, run):
    """Exact expectation over the sampled token. Back-propagated log p - log q at samples, and a
    top-k KL as an advantage that ignores the token, both give 0 here."""
    student, teacher = two_models(t=1)
    v = student.shape[1]
    every = on_logits(
        case, signal, student.expand(v, v), teacher.expand(v, v), k=4, targets=torch.arange(v)
    )
    on_policy = every.with_tokens(rollout_logprobs_T=student.log_softmax(-1)[0])
    per_token = run(
        on_policy,
        config("tail", "sampled"),
        alpha=0.0,
        num=1,
    )[0].gradients[0]
    expected = (student.softmax(-1)[0][:, None] * per_token).sum(0)
    leaf = student.clone().requires_grad_()
    kl = (leaf.softmax(-1) * (leaf.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    (full,) = torch.autograd.grad(kl, leaf)
    torch.testing.assert_close(expected, full[0])
    assert full.abs().max() > 0.01


@pytest.mark.parametrize(
    ("forward", "reverse"),
    [*((f, "none") for f in FORWARD), ("tail", "sampled"), ("tail", "topk_tail")],
)
def test_changing_the_teacher_changes_the_gradient(forward, reverse, case, signal, run):
    student, teacher = two_models()
    alpha = 1.0 if reverse == "none" else 0.0
    one, other = (
        run(
            on_logits(case, signal, student, logits, k=4),
            config(forward, reverse),
            alpha=alpha,
        )[0].gradients[0]
        for logits in (teacher, teacher + torch.eye(*teacher.shape, dtype=torch.float64))
    )
    assert ((one - other).abs().amax(1) > 1e-3).all()


def test_gate_and_forward_kl_speak_of_the_same_token(case, signal, run):
    student, teacher = two_models()
    gated = on_logits(case, signal, student, teacher, k=4).with_tokens(
        gate_T=torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0])
    )
    gradient = run(gated, config(), num=1)[0].gradients[0]
    ungated = run(
        on_logits(case, signal, student, teacher, k=4),
        config(),
        num=1,
    )[0].gradients[0]
    torch.testing.assert_close(gradient, gated.tokens.gate_T[:, None] * ungated)


def test_the_reverse_term_is_no_switch(case, signal, run):
    """It stays on where the gate is open: additive."""
    student, teacher = two_models()
    both = on_logits(case, signal, student, teacher, k=4)
    summed, forward = (
        run(
            both,
            config("tail", r),
            alpha=0.5,
        )[0].gradients[0]
        for r in ("sampled", "none")
    )
    reverse = run(both, config("tail", "sampled"), alpha=0.0)[0].gradients[0]
    torch.testing.assert_close(summed, forward + reverse)


def test_truncated_goes_negative_and_is_not_clamped(case, signal, run):
    teacher = torch.zeros(1, 9, dtype=torch.float64)
    student = torch.tensor([[1.5] * 4 + [0.0] * 5], dtype=torch.float64)
    spread = on_logits(case, signal, student, teacher - torch.arange(9) * 1e-3, k=4)
    result, _ = run(spread, config("truncated"), num=1)
    assert result.loss < -0.1
    assert result.gradients[0].abs().max() > 0.01
    assert run(spread, config("renormalized"), num=1)[0].loss > 0.0


def test_renormalized_is_never_negative_and_above_truncated_for_a_small_mass():
    g = torch.Generator().manual_seed(0)
    log_p, log_q = (
        torch.randn(
            500,
            6,
            generator=g,
            dtype=torch.float64,
        ).log_softmax(-1)
        for _ in range(2)
    )
    assert (forward_kl(RenormalizedForwardKl(), log_p, log_q) >= 0).all()
    assert (forward_kl(TruncatedForwardKl(), log_p, log_q) < 0).any()


def test_clip_stops_the_gradient_and_the_weight_is_capped(case, signal, run):
    """A > 0 and r > 1.2, or A < 0 and r < 0.8: no gradient. Otherwise -w A r d(log p)."""
    student, teacher = two_models(t=4)
    base = on_logits(case, signal, student, teacher, k=4)
    log_p = student.log_softmax(-1)[:, 0]
    # r = 1.65, 0.61, 1.65, 0.61
    old = log_p - torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    rollout = old - torch.tensor([2.0, -0.3, 0.1, 2.0], dtype=torch.float64)
    tokens = base.with_tokens(
        old_logprobs_T=old, teacher_logprobs_T=old + advantage, rollout_logprobs_T=rollout
    )
    result, _ = run(tokens, config("tail", "sampled"), alpha=0.0, num=1)
    weight, ratio = (old - rollout).exp().clamp(max=2.0), (log_p - old).exp()
    live = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    score = torch.eye(9, dtype=torch.float64)[0] - student.softmax(-1)
    torch.testing.assert_close(
        result.gradients[0], (-live * weight * advantage * ratio)[:, None] * score
    )
    assert result.metrics["eopd_clipped_ratio"] == 0.5
    assert result.metrics["eopd_importance_capped_ratio"] == 0.5
    assert result.metrics["eopd_importance_weight_mean"] == pytest.approx(weight.mean().item())


def test_freed_slots_are_ignored_whatever_their_id(case, run, oracle):
    """A merged end token frees a slot: the same loss as if the teacher had sent one candidate
    fewer.
    """
    full = case(2, t=8, v=12, k=5)
    ids, logprobs = full.tokens.teacher_topk_ids_TK, full.tokens.teacher_topk_logprobs_TK
    merged = torch.logaddexp(logprobs[:, 1], logprobs[:, 4])
    fewer = full.with_tokens(
        teacher_topk_ids_TK=ids[:, :4],
        teacher_topk_logprobs_TK=logprobs[:, :4].index_copy(
            1,
            torch.tensor([1]),
            merged[:, None],
        ),
    )

    for freed in (ids[:, 1], torch.full((8,), -1), torch.full((8,), 999)):
        slots = full.with_tokens(
            teacher_topk_ids_TK=torch.cat([fewer.tokens.teacher_topk_ids_TK, freed[:, None]], 1),
            teacher_topk_logprobs_TK=torch.cat(
                [fewer.tokens.teacher_topk_logprobs_TK, torch.full((8, 1), -torch.inf)], 1
            ),
        )
        for forward, reverse in (
            ("renormalized", "sampled"),
            ("tail", "topk_tail"),
            ("truncated", "none"),
        ):
            one, other = (
                run(slots, config(forward, reverse))[0],
                run(fewer, config(forward, reverse))[0],
            )
            torch.testing.assert_close(one.loss, other.loss)
            torch.testing.assert_close(one.gradients, other.gradients)
            assert one.loss.item() == pytest.approx(
                oracle(slots, config(forward, reverse)).loss.item()
            )
            assert one.metrics["eopd_student_topk_mass_ratio"] == pytest.approx(
                other.metrics["eopd_student_topk_mass_ratio"]
            )


def test_no_tail_term_where_candidates_are_the_vocabulary(case, run):
    full = case(4, v=6, k=6)
    for tail_of_a_rounded_teacher in (-torch.inf, -16.0):
        tail = torch.full_like(full.tokens.teacher_tail_logprobs_T, tail_of_a_rounded_teacher)
        for reverse in ("topk_tail", "none"):
            result, _ = run(full.with_tokens(teacher_tail_logprobs_T=tail), config("tail", reverse))
            plain, _ = run(full, config("tail", reverse))
            assert result.loss.isfinite()
            torch.testing.assert_close(result.loss, plain.loss)
            torch.testing.assert_close(result.gradients, plain.gradients)
