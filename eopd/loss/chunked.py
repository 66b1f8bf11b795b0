"""From hidden states to sums over loss rows and back, a chunk of rows at a time: no [T, V] tensor
ever exists.

                     V columns: the vocabulary
                 ┌───────────────────────────────┐
    masked rows  │ never computed                │
                 ├───────────────────────────────┤
    chunk 0      │ C x V logits                  │  one buffer [C, V] is held; each chunk
                 ├───────────────────────────────┤  overwrites the one before
    chunk 1      │ C x V logits                  │
                 └───────────────────────────────┘
                 T rows: the packed tokens

Forward goes through every chunk once, with three matrix products:

    hidden [C, D], head [V, D] ──▶ logits [C, V] ──▶ K + 2 numbers a row ──▶ loss, sums
    hidden and head gradients ◀── logit gradient ◀── K + 2 derivatives a row ◀──┘

Backward only scales the gradients that forward has left (as the fused linear cross entropy of Liger
Kernel, arXiv 2410.10989, does). ``logits.py`` has the formulas of a row.

Extra memory: one chunk buffer (two under a soft-cap; half of one more for half-precision heads),
one float32 [V, D] gradient, and a float32 head where it differs in dtype from the hidden states.
All else works in cache-sized blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from eopd.loss.forward_kl import tail
from eopd.loss.inputs import Head, LossTokens
from eopd.loss.logits import Gradients, LogitChunks, Reading

# From a chunk to sums over its rows, float64 [N]; the first is the loss, and alone has gradients.
Measure = Callable[[Reading, LossTokens], Tensor]


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: Gradients | None
    dtypes: tuple[torch.dtype | None, ...]


class _ChunkedSum(torch.autograd.Function):
    """All chunks, seen by autograd. Backward hands out what forward has left, so it runs once."""

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
        chunks = LogitChunks(hidden_TD, head, tokens, chunk_tokens)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # In the working dtype, and divided by the number of tokens only in backward: float16 would
        # underflow.
        gradients = Gradients(
            torch.zeros_like(hidden_TD) if wants_hidden else None,
            torch.zeros_like(weight_VD, dtype=chunks.dtype) if wants_weight else None,
            torch.zeros_like(bias_V, dtype=chunks.dtype)
            if wants_bias and bias_V is not None
            else None,
        )
        sums_of_chunks = []

        for chunk in chunks:
            reading = chunk.reading
            numbers = (reading.target_logits_C, reading.topk_logits_CK, reading.tail_logits_C)
            with torch.enable_grad():
                for number in numbers:
                    number.requires_grad_()

                sums_N = measure(reading, chunk.tokens)
                loss = sums_N[0]

            sums_of_chunks.append(sums_N.detach())
            if wants_hidden or wants_weight or wants_bias:
                derivatives = torch.autograd.grad(loss, numbers, materialize_grads=True)
                chunks.add_gradients(gradients, chunk, *derivatives)

        ctx.gradients = gradients
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total_N = torch.stack(sums_of_chunks).sum(0)
        ctx.mark_non_differentiable(total_N)

        return total_N[0].clone(), total_N

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were already handed out: retain_graph is not supported"
            )

        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]

        return (*scaled, None, None, None, None)


def chunked_sums(
    hidden_TD: Tensor, head: Head, tokens: LossTokens, measure: Measure, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sums ``measure`` over all loss rows, ``chunk_tokens`` of them at a time.

    Returns:
        The loss, float64 [], with gradients for hidden states, head weight and bias (zeros where no
        row counts), and all sums, float64 [N], without.
    """
    sources = [hidden_TD, head.weight_VD, head.bias_V]
    if not torch.is_grad_enabled():
        sources = [source if source is None else source.detach() for source in sources]

    with torch.autocast(hidden_TD.device.type, enabled=False):
        loss, sums_N = _ChunkedSum.apply(*sources, head, tokens, measure, chunk_tokens)  # type: ignore[no-untyped-call]

    return loss, sums_N


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Student against teacher, per token: float64 [T], 0 where masked. KL and entropy in nats."""

    student_logprobs_T: Tensor  # what ``old_logprobs_T`` is made of
    student_entropy_T: Tensor
    reverse_kl_T: Tensor  # log p(y) - log q(y)
    forward_kl_T: Tensor  # the ``tail`` form
    top1_agreement_T: Tensor  # 1 where both have the same most likely token


def token_statistics(
    hidden_TD: Tensor, head: Head, tokens: LossTokens, *, chunk_tokens: int = 256
) -> TokenStatistics:
    """Measures without gradient, in the arithmetic of ``objective`` and with its arguments."""
    columns = torch.zeros((5, len(hidden_TD)), dtype=torch.float64, device=hidden_TD.device)

    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        for chunk in LogitChunks(hidden_TD, head, tokens, chunk_tokens):
            columns[:, chunk.rows_C] = _statistics(chunk.reading, chunk.tokens)

    return TokenStatistics(*columns)


def _statistics(reading: Reading, tokens: LossTokens) -> Tensor:
    """Returns the fields of ``TokenStatistics`` for C rows, float64 [5, C]."""
    logprobs, log_p = reading.student_logprobs(), reading.student_outcomes()
    teacher_top = tokens.teacher_topk_logprobs_TK.argmax(-1, keepdim=True)
    agrees = reading.topk_logits_CK.gather(1, teacher_top).squeeze(1) >= reading.top_logits_C

    return torch.stack(
        [
            logprobs,
            reading.student_entropy(log_p),
            logprobs - tokens.teacher_logprobs_T.double(),
            tail(log_p, tokens.teacher_outcomes()),
            agrees.double(),
        ]
    )
