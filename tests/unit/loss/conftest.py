"""Random cases, and the objective written out token by token over the whole vocabulary in
float64: the oracle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.loss import chunked
from eopd.loss.chunked import Head, LossTokens
from eopd.loss.kernels import CudaKernels
from eopd.loss.objective import LossTerms, objective
from eopd.metrics import reduce

METRICS = [
    "loss",
    "reverse_kl_nats",
    "forward_kl_nats",
    "forward_kl_gated_nats",
    "forward_kl_ungated_nats",
    "gate_ratio",
    "teacher_entropy_nats",
    "student_entropy_nats",
    "teacher_topk_mass_ratio",
    "student_topk_mass_ratio",
    "topk_overlap_ratio",
    "importance_weight_mean",
    "importance_capped_ratio",
    "logprob_gap_nats",
    "clipped_ratio",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    hidden: Tensor
    weight: Tensor
    tokens: LossTokens
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def leaves(self) -> list[Tensor]:
        return [
            x.detach().clone().requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
            if x is not None
        ]

    def head(self, weight: Tensor, bias: Tensor | None = None) -> Head:
        return Head(
            weight_VD=weight,
            bias_V=bias,
            logit_scale=self.scale,
            logit_softcap=self.softcap,
            temperature=self.temperature,
        )

    def with_tokens(self, **changes: Any) -> "Case":
        return replace(self, tokens=replace(self.tokens, **changes))


@dataclass(frozen=True, kw_only=True)
class Result:
    loss: Tensor
    gradients: list[Tensor]
    metrics: dict[str, float]


def teacher_signal(logits: Tensor, k: int, targets: Tensor) -> dict[str, Tensor]:
    """What a teacher with these logits [T, V] would send."""
    log_q = logits.double().log_softmax(-1)
    top = log_q.topk(k)
    rest = log_q.scatter(1, top.indices, -math.inf).logsumexp(-1)

    return {
        "teacher_logprobs_T": log_q.gather(1, targets[:, None])[:, 0],
        "teacher_topk_ids_TK": top.indices,
        "teacher_topk_logprobs_TK": top.values,
        "teacher_tail_logprobs_T": rest,
        "teacher_entropy_T": -(log_q.exp() * log_q).sum(-1),
    }


def random_case(
    seed: int,
    *,
    t: int = 7,
    v: int = 11,
    d: int = 3,
    k: int = 4,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: bool = False,
    old: bool = False,
    bonus: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    targets = torch.randint(v, (t,), generator=g)
    tokens = LossTokens(
        target_ids_T=targets,
        loss_mask_T=torch.rand(t, generator=g) < 0.7,
        rollout_logprobs_T=-2.0 + randn(t),
        old_logprobs_T=-2.0 + 0.3 * randn(t) if old else None,
        gate_T=torch.rand(t, generator=g, dtype=torch.float64),
        advantage_bonus_T=randn(t) if bonus else None,
        **teacher_signal(2.0 * randn(t, v), k, targets),
    )

    return Case(
        hidden=randn(t, d),
        weight=randn(v, d),
        bias=randn(v) if bias else None,
        tokens=tokens,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
    )


def evaluate(
    case: Case, config: LossConfig, *, alpha: float = 1.0, num: int = 20, chunk_tokens: int = 2
) -> tuple[Result, LossTerms]:
    """The code under test, with its gradients by (hidden, weight[, bias]); ``num`` is only
    the loss's denominator.
    """
    hidden, weight, *bias = case.leaves()
    loss, terms = objective(
        hidden,
        case.head(weight, *bias),
        case.tokens,
        config,
        num_loss_tokens=num,
        alpha=alpha,
        chunk_tokens=chunk_tokens,
    )
    gradients = torch.autograd.grad(loss, [hidden, weight, *bias])

    return Result(
        loss=loss.detach(),
        gradients=list(gradients),
        metrics=reduce([terms.metrics(int(case.tokens.loss_mask_T.sum()))]),
    ), terms


def logits_of(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = torch.einsum("td,vd->tv", hidden.double(), weight.double()) * case.scale
    if bias is not None:
        x = x + bias.double()

    if case.softcap is not None:
        x = case.softcap * (x / case.softcap).tanh()

    return x / case.temperature


def row_forward(
    kind: str, log_p: Tensor, ids: list[int], log_q: list[float], log_q_rest: float
) -> Tensor:
    """Forward KL of one row, from the full log-softmax of the student."""
    mass = sum(math.exp(x) for x in log_q)
    total = torch.zeros((), dtype=torch.float64)

    for i, lq in zip(ids, log_q, strict=True):
        if kind == "renormalized":
            total = total + math.exp(lq) / mass * (lq - math.log(mass) - log_p[i])
        else:
            total = total + math.exp(lq) * (lq - log_p[i])

    others = [v for v in range(len(log_p)) if v not in set(ids)]
    if kind == "tail" and others and log_q_rest > -math.inf:
        total = total + math.exp(log_q_rest) * (log_q_rest - log_p[others].logsumexp(0))

    return total


def row_reverse(
    config: LossConfig,
    log_p: Tensor,
    y: int,
    row: dict[str, float],
    ids: list[int],
    log_q: list[float],
) -> tuple[Tensor, float, bool, bool]:
    """Reverse KL of one row, its importance weight, whether that was capped, whether the
    ratio was clipped.
    """
    if config.reverse_kl.kind == "sampled":
        advantage = row["teacher"] - row["old"] + row["bonus"]
        ratio, b = (log_p[y] - row["old"]).exp(), row["old"] - row["rollout"]
        low, high = 1 - config.reverse_kl.clip, 1 + config.reverse_kl.clip
        clipped = bool(ratio > high) if advantage > 0 else bool(ratio < low)
        surrogate = -advantage * ((high if advantage > 0 else low) if clipped else ratio)
        weight = min(math.exp(b), config.reverse_kl.importance_cap)
        term = weight * torch.as_tensor(surrogate, dtype=torch.float64)
        return term, weight, math.exp(b) > config.reverse_kl.importance_cap, clipped

    total = torch.zeros((), dtype=torch.float64)
    if config.reverse_kl.kind == "topk_tail":
        for i, lq in zip(ids, log_q, strict=True):
            total = total + log_p[i].exp() * (log_p[i] - lq)

        others = [v for v in range(len(log_p)) if v not in set(ids)]
        if others and row["rest"] > -math.inf:
            rest = log_p[others].logsumexp(0)
            total = total + rest.exp() * (rest - row["rest"])

    return total, 1.0, False, False


def brute_force(case: Case, config: LossConfig, *, alpha: float = 1.0, num: int = 20) -> Result:
    hidden, weight, *bias = case.leaves()
    tokens, rows = case.tokens, case.tokens.loss_mask_T.nonzero()[:, 0].tolist()
    total = 0.0 * (
        hidden.double().sum() + weight.double().sum() + sum(x.double().sum() for x in bias)
    )
    seen: list[list[float]] = []
    log_p_TV = logits_of(case, hidden, weight, bias[0] if bias else None).log_softmax(-1)

    for t in rows:
        log_p, y = log_p_TV[t], int(tokens.target_ids_T[t])
        fixed = log_p.detach()
        pairs = zip(
            tokens.teacher_topk_ids_TK[t].tolist(),
            tokens.teacher_topk_logprobs_TK[t].tolist(),
            strict=True,
        )
        kept = [(i, lq) for i, lq in pairs if lq > -math.inf]
        ids, log_q = [i for i, _ in kept], [lq for _, lq in kept]
        row = {
            "teacher": float(tokens.teacher_logprobs_T[t]),
            "rollout": float(tokens.rollout_logprobs_T[t]),
            "old": float(fixed[y] if tokens.old_logprobs_T is None else tokens.old_logprobs_T[t]),
            "bonus": 0.0
            if tokens.advantage_bonus_T is None
            else float(tokens.advantage_bonus_T[t]),
            "rest": float(tokens.teacher_tail_logprobs_T[t]),
        }
        reverse, importance, capped, clipped = row_reverse(
            config,
            log_p,
            y,
            row,
            ids,
            log_q,
        )
        forward, gate = (
            row_forward(config.forward_kl.kind, log_p, ids, log_q, row["rest"]),
            float(tokens.gate_T[t]),
        )
        loss = reverse + alpha * gate * forward
        total = total + loss
        favourites = log_p.topk(tokens.teacher_topk_ids_TK.shape[1]).indices.tolist()
        seen.append(
            [
                loss.item(),
                row["old"] - row["teacher"],
                forward.item(),
                gate * forward.item(),
                (1 - gate) * forward.item(),
                gate,
                float(tokens.teacher_entropy_T[t]),
                float(-(fixed.exp() * fixed).sum()),
                sum(math.exp(x) for x in log_q),
                float(fixed[ids].exp().sum()),
                len(set(ids) & set(favourites)) / len(favourites),
                importance,
                capped,
                abs(row["old"] - row["rollout"]),
                clipped,
            ]
        )

    sums = [sum(column) for column in zip(*seen, strict=True)] if seen else [0.0] * len(METRICS)
    count, gate_sum = max(len(rows), 1), sums[5]
    denominators = [count, count, count, gate_sum or 1.0, (count - gate_sum) or 1.0] + [count] * 10
    metrics = {
        f"eopd_{n}": s / d
        for n, s, d in zip(
            METRICS,
            sums,
            denominators,
            strict=True,
        )
    }
    gradients = torch.autograd.grad(total / num, [hidden, weight, *bias])

    return Result(loss=total.detach() / num, gradients=list(gradients), metrics=metrics)


class ImitatedCudaKernels(CudaKernels):
    """What a GPU does, where a CPU cannot multiply half precision into float32."""

    def __init__(self, weight: Tensor, rows: int, dtype: torch.dtype, *, has_bias: bool) -> None:
        super().__init__(weight, rows, dtype)

    def project(self, hidden_CD: Tensor) -> Tensor:
        logits_CV = self._padded[: len(hidden_CD), : self._vocabulary]
        weight_VD = self._weight_VD.to(self._dtype)
        return torch.mm(hidden_CD.to(self._dtype), weight_VD.t(), out=logits_CV)

    def add_weight_gradient(self, sums_VD: Tensor, operand_CV: Tensor, hidden_CD: Tensor) -> None:
        sums_VD.addmm_(operand_CV.t().to(self._dtype), hidden_CD.to(self._dtype))


@pytest.fixture(autouse=True, params=["cpu", "cuda"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of the loss runs on the kernels of both devices."""
    if request.param == "cuda":
        monkeypatch.setattr(chunked, "open_kernels", ImitatedCudaKernels)


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return random_case


@pytest.fixture(scope="session")
def signal() -> Callable[..., dict[str, Tensor]]:
    return teacher_signal


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[Result, LossTerms]]:
    return evaluate


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Result]:
    return brute_force
