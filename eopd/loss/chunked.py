"""From hidden states to log-probabilities and back, a chunk of rows at a time: no [T, V] tensor
ever exists.

All that the objective needs to know of a row of V logits is K + 2 numbers: the logits of the
sampled token and of the teacher's K candidates, and the logsumexp of all other logits (never 1 - P:
in float32 nearly certain rows would lose their tail). So a chunk is

    project -> read K + 2 numbers -> loss and K + 2 derivatives -> logit gradient in place ->
    hidden, head gradients

in one sweep of three matrix products, forward; backward only scales what it left. Work on the
vocabulary is float32 (float64 for float64 inputs), on the K + 2 numbers float64: that costs
nothing, and in nearly certain rows they cancel. Of half-precision inputs the logits are float32
too; the two gradient products take half-precision operands.

Extra memory: one chunk buffer (two under a soft-cap; half of one more for half-precision heads),
one float32 [V, D] gradient, and a float32 head where it differs in dtype from the hidden states.
All else works in cache-sized blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from eopd.loss.forward_kl import outcomes, tail

# Added to the candidates' logits to take them out of the tail: far below any logit, yet finite,
# since 0 x inf is NaN.
_REMOVED = -1e30

# Rows to a block that stays in a CPU's cache: of logits, and of the head (whole on CUDA, where
# launches cost more).
_LOGIT_ROWS, _HEAD_ROWS = 16, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """What sampler and teacher said of T packed tokens. Row t of the hidden states predicts
    ``target_ids_T[t]``.

    Rows where ``loss_mask_T`` is False are never read: they may hold anything. Log-probabilities
    and entropies in nats. A candidate at -inf is ignored, whatever its id: it is the freed slot of
    a merged end token.
    """

    target_ids_T: Tensor  # int
    loss_mask_T: Tensor  # bool
    rollout_logprobs_T: Tensor  # of the weights that sampled the token
    # of the student at the start of the batch; None: that is the student now
    old_logprobs_T: Tensor | None = None
    gate_T: Tensor  # in [0, 1]
    teacher_logprobs_T: Tensor
    teacher_topk_ids_TK: Tensor  # int, distinct in a row
    teacher_topk_logprobs_TK: Tensor
    teacher_tail_logprobs_T: Tensor  # log of the mass outside the top k; -inf where k = V
    advantage_bonus_T: Tensor | None = None
    teacher_entropy_T: Tensor | None = None  # a diagnostic only

    def select(self, rows: Tensor) -> Self:
        """The tokens at ``rows`` (int [C]), in that order."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        selected: dict[str, Any] = {
            name: column[rows] for name, column in columns.items() if column is not None
        }
        return type(self)(**selected)

    def teacher_outcomes(self) -> Tensor:
        """Teacher log-probabilities of its candidates and the rest, float64 [T, K + 1]."""
        return outcomes(
            self.teacher_topk_logprobs_TK.double(), self.teacher_tail_logprobs_T.double()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from hidden states to logits: ``softcap(hidden @ weight^T * logit_scale + bias)
    / temperature``.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read of a chunk's logits, float64. The first three carry all gradients."""

    target_logits_C: Tensor
    topk_logits_CK: Tensor  # -inf at ignored candidates
    # logsumexp of the logits outside the candidates; -inf where there are none
    tail_logits_C: Tensor
    tail_entropy_C: Tensor  # of the student's softmax over the tokens outside the candidates
    top_logits_C: Tensor  # the largest of all V
    topk_overlap_C: Tensor  # share of the candidates that are also in the student's top k

    def student_outcomes(self) -> Tensor:
        """Student log-probabilities of the teacher's candidates and the rest, [C, K + 1]."""
        return outcomes(self.topk_logits_CK, self.tail_logits_C).log_softmax(-1)

    def student_logprobs(self) -> Tensor:
        """Log-probabilities of the sampled tokens, [C]."""
        return self.target_logits_C - outcomes(self.topk_logits_CK, self.tail_logits_C).logsumexp(
            -1
        )

    def student_entropy(self) -> Tensor:
        """Exact full-vocabulary entropy, [C]: that of the K + 1 outcomes, plus that within
        the last one.
        """
        log_p = self.student_outcomes()
        of_outcomes: Tensor = torch.special.entr(log_p.exp()).sum(-1)
        return of_outcomes + log_p[:, -1].exp() * self.tail_entropy_C


# From a chunk to sums over its rows, float64 [N]; the first is the loss, and alone has gradients.
Measure = Callable[[Reading, LossTokens], Tensor]

# By hidden states [T, D], head [V, D] and bias [V]; None where it is not wanted.
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Sweep:
    """Logits of one chunk of loss rows after the other, and their gradients, in buffers that
    all chunks share.
    """

    def __init__(
        self, hidden_TD: Tensor, head: Head, tokens: LossTokens, chunk_tokens: int
    ) -> None:
        self.hidden_TD, self.head, self.tokens, self.chunk_tokens = (
            hidden_TD,
            head,
            tokens,
            chunk_tokens,
        )
        self.rows_L = tokens.loss_mask_T.nonzero().squeeze(1)
        weight = head.weight_VD
        self.dtype = (
            torch.float64 if torch.float64 in (weight.dtype, hidden_TD.dtype) else torch.float32
        )
        # Two operands of one dtype are multiplied as they are; otherwise both are brought to the
        # working dtype.
        self.operand_dtype = weight.dtype if weight.dtype == hidden_TD.dtype else self.dtype
        self.operand_VD = weight.to(self.operand_dtype)
        half = self.operand_dtype != self.dtype
        # Only CUDA multiplies half-precision operands straight into float32; elsewhere blocks of
        # the head are copied.
        self.mixed = weight.is_cuda and half
        num_rows = len(weight) if weight.is_cuda else _HEAD_ROWS
        self.head_blocks = [
            slice(start, start + num_rows) for start in range(0, len(weight), num_rows)
        ]
        shape = (min(chunk_tokens, len(self.rows_L)), len(weight))
        self.logits = torch.empty(shape, dtype=self.dtype, device=weight.device)
        self.shifted = torch.empty_like(self.logits[:_LOGIT_ROWS])
        self.operand = torch.empty_like(self.logits, dtype=self.operand_dtype) if half else None
        self.capped = None if head.logit_softcap is None else torch.empty_like(self.logits)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, LossTokens, Reading]]:
        """Rows [C], hidden states, tokens and reading of every chunk: of a single empty one
        where no row counts.
        """
        for start in range(0, max(len(self.rows_L), 1), self.chunk_tokens):
            rows = self.rows_L[start : start + self.chunk_tokens]
            hidden_CD, chunk = self.hidden_TD[rows], self.tokens.select(rows)
            yield rows, hidden_CD, chunk, self._read(hidden_CD, chunk)

    def _read(self, hidden_CD: Tensor, tokens: LossTokens) -> Reading:
        """Project a chunk and read it; leaves the softmax over the tail, unnormalised, for
        ``logit_gradient``.
        """
        logits = self._project(hidden_CD)
        kept = tokens.teacher_topk_logprobs_TK != -torch.inf
        self.kept_CK, self.ids_CK = kept, tokens.teacher_topk_ids_TK.long().masked_fill(~kept, 0)
        self.targets_C1 = tokens.target_ids_T.long().unsqueeze(1)
        num_candidates = self.ids_CK.shape[1]
        target = logits.gather(1, self.targets_C1).squeeze(1)
        candidates = logits.gather(1, self.ids_CK).masked_fill(~kept, -torch.inf)
        # Added, not written: an ignored candidate may share its id with a kept one.
        logits.scatter_add_(1, self.ids_CK, kept.to(self.dtype) * _REMOVED)
        rivals = logits.topk(num_candidates).values
        peak = rivals[:, :1]
        self.total_C1, weighted_C1 = self._exponentiate(logits, peak)
        total = self.total_C1.squeeze(1).double()
        best = torch.cat([candidates, rivals], dim=1).topk(num_candidates)
        nothing_left = kept.sum(-1) == logits.shape[1]

        return Reading(
            target_logits_C=target.double(),
            topk_logits_CK=candidates.double(),
            tail_logits_C=(peak.squeeze(1).double() + total.log()).masked_fill(
                nothing_left, -torch.inf
            ),
            tail_entropy_C=total.log() - weighted_C1.squeeze(1).double() / total,
            top_logits_C=best.values[:, 0].double(),
            topk_overlap_C=(best.indices < num_candidates).double().mean(-1),
        )

    def logit_gradient(self, target_C: Tensor, topk_CK: Tensor, tail_C: Tensor) -> Tensor:
        """From derivatives by what was read last to those by ``hidden @ weight^T *
        logit_scale + bias``, [C, V].
        """
        # In float64: of a nearly certain candidate that was sampled, 1 - p would be lost in
        # float32.
        among_CK = self.kept_CK & (self.ids_CK == self.targets_C1)
        merged = (target_C * ~among_CK.any(1), topk_CK + among_CK * target_C.unsqueeze(1), tail_C)
        target, topk, tail = (part.to(self.dtype) / self.head.temperature for part in merged)
        gradient = self.logits[: len(target)].mul_(tail.unsqueeze(1) / self.total_C1)
        gradient.scatter_add_(1, self.ids_CK, topk)
        gradient.scatter_add_(1, self.targets_C1, target.unsqueeze(1))
        if self.capped is not None:
            gradient.mul_(self.capped[: len(target)].square_().neg_().add_(1.0))

        return gradient

    def add_gradients(
        self, sums: _Gradients, rows: Tensor, hidden_CD: Tensor, logit_gradient_CV: Tensor
    ) -> None:
        """Add a chunk's share; spends ``logit_gradient_CV``."""
        hidden_sum, weight_sum, bias_sum = sums
        if bias_sum is not None:
            bias_sum.add_(logit_gradient_CV.sum(0))

        if self.head.logit_scale != 1.0:
            logit_gradient_CV.mul_(self.head.logit_scale)

        operand, hidden_CD = logit_gradient_CV, hidden_CD.to(self.operand_dtype)
        if self.operand is not None:
            operand = self.operand[: len(rows)].copy_(logit_gradient_CV)

        if hidden_sum is not None:
            hidden_sum[rows] = (operand @ self.operand_VD).to(hidden_sum.dtype)

        if weight_sum is None:
            return

        for block in self.head_blocks:
            if self.operand is None:
                weight_sum[block].addmm_(operand[:, block].t(), hidden_CD)
            else:
                weight_sum[block].add_(operand[:, block].t() @ hidden_CD)

    def _exponentiate(self, logits: Tensor, peak_C1: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(logits - peak)``, in place; row sums of it, and of it times its logarithm,
        each [C, 1].
        """
        total_C1, weighted_C1 = torch.empty_like(peak_C1), torch.empty_like(peak_C1)
        for start in range(0, len(logits), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            probs = logits[rows]
            shifted = torch.sub(probs, peak_C1[rows], out=self.shifted[: len(probs)])
            total_C1[rows] = torch.exp(shifted, out=probs).sum(-1, keepdim=True)
            if self.head.bias_V is not None:
                # a bias of -inf makes tokens impossible, and 0 x inf is NaN
                shifted.clamp_(min=_REMOVED)

            weighted_C1[rows] = shifted.mul_(probs).sum(-1, keepdim=True)

        return total_C1, weighted_C1

    def _project(self, hidden_CD: Tensor) -> Tensor:
        head, logits = self.head, self.logits[: len(hidden_CD)]
        for block in self.head_blocks:
            weight = self.operand_VD[block]
            if self.mixed:
                torch.mm(hidden_CD, weight.t(), out_dtype=self.dtype, out=logits[:, block])
            else:
                torch.mm(hidden_CD.to(self.dtype), weight.to(self.dtype).t(), out=logits[:, block])

        if head.logit_scale != 1.0:
            logits.mul_(head.logit_scale)

        if head.bias_V is not None:
            logits.add_(head.bias_V)

        if head.logit_softcap is not None and self.capped is not None:
            capped = torch.tanh(logits.div_(head.logit_softcap), out=self.capped[: len(logits)])
            torch.mul(capped, head.logit_softcap, out=logits)

        return logits if head.temperature == 1.0 else logits.div_(head.temperature)


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: _Gradients | None
    dtypes: tuple[torch.dtype | None, ...]


class _ChunkedSum(torch.autograd.Function):
    """The sweep, seen by autograd. Backward hands out what forward has left, so it runs once."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,  # holds weight_VD and bias_V too, but autograd sees arguments only
        tokens: LossTokens,
        measure: Measure,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        sweep = _Sweep(hidden_TD, head, tokens, chunk_tokens)
        wanted = ctx.needs_input_grad[:3]
        # In the working dtype, and divided by the number of tokens only in backward: float16 would
        # underflow.
        gradients: _Gradients = (
            torch.zeros_like(hidden_TD) if wanted[0] else None,
            torch.zeros_like(weight_VD, dtype=sweep.dtype) if wanted[1] else None,
            torch.zeros_like(bias_V, dtype=sweep.dtype)
            if wanted[2] and bias_V is not None
            else None,
        )
        totals = []

        for rows, hidden_CD, chunk, reading in sweep.chunks():
            read = (reading.target_logits_C, reading.topk_logits_CK, reading.tail_logits_C)
            with torch.enable_grad():
                for tensor in read:
                    tensor.requires_grad_()

                sums = measure(reading, chunk)
                loss = sums[0]

            totals.append(sums.detach())
            if any(wanted):
                derivatives = torch.autograd.grad(loss, read, materialize_grads=True)
                sweep.add_gradients(gradients, rows, hidden_CD, sweep.logit_gradient(*derivatives))

        ctx.gradients = gradients
        ctx.dtypes = (
            hidden_TD.dtype,
            weight_VD.dtype,
            bias_V.dtype if bias_V is not None else None,
        )
        total = torch.stack(totals).sum(0)
        ctx.mark_non_differentiable(total)

        return total[0].clone(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were already handed out: retain_graph is not supported"
            )

        scaled = [
            None if g is None else g.mul_(factor).to(d)
            for g, d in zip(gradients, ctx.dtypes, strict=True)
        ]

        return (*scaled, None, None, None, None)


def chunked_sums(
    hidden_TD: Tensor, head: Head, tokens: LossTokens, measure: Measure, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sum ``measure`` over all loss rows, ``chunk_tokens`` of them at a time.

    Returns:
        The loss, float64 [], with gradients for hidden states, head weight and bias (zeros where no
        row counts), and all sums, float64 [N], without.
    """
    sources = [hidden_TD, head.weight_VD, head.bias_V]
    if not torch.is_grad_enabled():
        sources = [source if source is None else source.detach() for source in sources]

    with torch.autocast(hidden_TD.device.type, enabled=False):
        loss, sums = _ChunkedSum.apply(*sources, head, tokens, measure, chunk_tokens)  # type: ignore[no-untyped-call]

    return loss, sums


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Student against teacher, per token: float64 [T], 0 where masked. KL and entropy in nats."""

    student_logprobs_T: Tensor  # what ``old_logprobs_T`` is made of
    student_entropy_T: Tensor
    reverse_kl_T: Tensor  # log p(y) - log q(y)
    forward_kl_T: Tensor  # the ``tail`` form
    top1_agreement_T: Tensor  # 1 where both have the same most likely token


def token_statistics(
    student_hidden_TD: Tensor,
    head_weight_VD: Tensor,
    tokens: LossTokens,
    *,
    head_bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> TokenStatistics:
    """Measure without gradient, in the arithmetic of the objective; arguments as there."""
    head = Head(
        weight_VD=head_weight_VD,
        bias_V=head_bias_V,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
    )
    columns = torch.zeros(
        (5, len(student_hidden_TD)), dtype=torch.float64, device=student_hidden_TD.device
    )

    with torch.no_grad(), torch.autocast(student_hidden_TD.device.type, enabled=False):
        for rows, _, chunk, reading in _Sweep(
            student_hidden_TD, head, tokens, chunk_tokens
        ).chunks():
            columns[:, rows] = _statistics(reading, chunk)

    return TokenStatistics(*columns)


def _statistics(reading: Reading, tokens: LossTokens) -> Tensor:
    logprobs = reading.student_logprobs()
    favourite = tokens.teacher_topk_logprobs_TK.argmax(-1, keepdim=True)
    agrees = reading.topk_logits_CK.gather(1, favourite).squeeze(1) >= reading.top_logits_C

    return torch.stack(
        [
            logprobs,
            reading.student_entropy(),
            logprobs - tokens.teacher_logprobs_T.double(),
            tail(reading.student_outcomes(), tokens.teacher_outcomes()),
            agrees.double(),
        ]
    )
