"""The loss on a GPU: against float64, and what it takes at a vocabulary of 151,936."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

from dataclasses import replace

from bench_loss import Case, make_inputs, make_tokens, measure
from torch.profiler import ProfilerActivity, profile

from eopd.config import LossConfig
from eopd.loss.chunked import Head
from eopd.loss.objective import objective, token_statistics

QWEN, ODD = 151_936, 50_257  # the latter fills no whole number of blocks
CONFIG = LossConfig()


def dense(hidden, weight, tokens):
    """The paper's forms in float64; on-policy, so that the clip is idle."""
    log_p = (hidden @ weight.t()).log_softmax(-1)
    log_p_y = log_p.gather(1, tokens.target_ids_T[:, None]).squeeze(1)
    old = log_p_y.detach()
    importance = (old - tokens.rollout_logprobs_T).exp().clamp(max=2.0)
    reverse = -importance * (tokens.teacher_logprobs_T - old) * (log_p_y - old).exp()
    log_q = tokens.teacher_topk_logprobs_TK.double().log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p.gather(1, tokens.teacher_topk_ids_TK))).sum(-1)
    return (reverse + CONFIG.alpha * tokens.gate_T * forward).mean()


def gradients(loss, *leaves):
    loss.backward()
    return [leaf.grad.double() for leaf in leaves]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("vocabulary", [QWEN, ODD])
@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"),
    [("float64", 1e-12, 1e-12), ("float32", 1e-6, 1e-5), ("bfloat16", 1e-5, 5e-3)],
)
def test_loss_and_gradients_are_those_of_a_dense_one_in_float64(
    dtype, of_loss, of_gradients, vocabulary
):
    hidden, weight, tokens = make_inputs(
        Case("chunked", vocabulary, 700, dtype, 1024, "cuda", chunk_tokens=256)
    )
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = dense(*exact, tokens)

    head = Head(weight_VD=weight)
    loss, _ = objective(
        hidden, head, tokens, CONFIG, num_loss_tokens=700, alpha=CONFIG.alpha, chunk_tokens=256
    )

    assert relative_error(loss.double(), expected) < of_loss
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True)
    for found, wanted in pairs:
        assert relative_error(found, wanted) < of_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_a_head_does_is_what_it_does_on_a_cpu(dtype):
    t, v, d = 90, 1000, 64
    hidden, weight = torch.randn(t, d).to(dtype), (0.3 * torch.randn(v, d)).to(dtype)
    bias = torch.randn(v).to(dtype)
    bias[5::7] = -torch.inf
    tokens = make_tokens(t, v, "cpu")
    ids = tokens.teacher_topk_ids_TK
    tokens = replace(
        tokens,
        target_ids_T=tokens.target_ids_T - (tokens.target_ids_T % 7 == 5).long(),
        teacher_topk_ids_TK=ids - (ids % 7 == 5).long(),
        loss_mask_T=torch.rand(t) < 0.8,
    )
    results = []

    for device, working in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [x.to(device, working).requires_grad_() for x in (hidden, weight, bias)]
        there = tokens.map(lambda column, device=device: column.to(device))
        head = Head(
            weight_VD=leaves[1],
            bias_V=leaves[2],
            logit_scale=0.5,
            logit_softcap=20.0,
            temperature=0.7,
        )
        loss, terms = objective(
            leaves[0], head, there, CONFIG, num_loss_tokens=60, alpha=1.0, chunk_tokens=32
        )
        statistics = token_statistics(leaves[0].detach(), head, there, chunk_tokens=32)
        results.append(
            [
                loss.double().cpu(),
                terms.vector().cpu(),
                *(gradient.cpu() for gradient in gradients(loss, *leaves)),
                *statistics[1:4].cpu(),
            ]
        )

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < tolerance


def test_a_micro_batch_without_loss_tokens_still_runs_backward():
    hidden, weight, tokens = make_inputs(Case("chunked", 1000, 8, "bfloat16", 64, "cuda", 256))
    tokens = replace(tokens, loss_mask_T=torch.zeros(8, dtype=torch.bool, device="cuda"))
    loss, _ = objective(
        hidden, Head(weight_VD=weight), tokens, CONFIG, num_loss_tokens=0, alpha=1.0
    )
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden, weight))


def test_few_kernels_are_started_and_little_memory_is_held():
    case = Case("chunked", QWEN, 4096, "bfloat16", 1024, "cuda", chunk_tokens=2048)
    found = measure(case, 3)
    # 2,048 rows of logits and their gradient, the head's gradient in float32, little else
    assert found.extra_bytes < 6 * 2048 * QWEN + 4 * QWEN * 1024 + 5e8

    hidden, weight, tokens = make_inputs(case)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loss, _ = objective(
            hidden,
            Head(weight_VD=weight),
            tokens,
            CONFIG,
            num_loss_tokens=4096,
            alpha=1.0,
            chunk_tokens=2048,
        )
        loss.backward()
        torch.cuda.synchronize()

    kernels = sum(event.count for event in profiler.key_averages() if event.device_time > 0)
    assert 0 < kernels <= 800


def test_it_takes_no_longer_than_a_dense_loss_with_logits_in_float32():
    case = Case("chunked", QWEN, 8192, "bfloat16", 1024, "cuda", chunk_tokens=2048)
    ours, theirs = (measure(replace(case, kind=kind), 10) for kind in ("chunked", "dense_f32"))
    assert ours.seconds <= theirs.seconds
