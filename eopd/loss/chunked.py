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
Kernel, arXiv 2410.10989, does).

Of a row of V logits z the objective needs K + 2 numbers only. With the sampled token y and the
teacher's K candidates S these are

    z_y        z_c for c in S        s = log sum exp z_j over all j outside S, the tail

The tail is never 1 - P: in float32 a nearly certain row would lose it. By the chain rule a loss L
of these numbers has the gradient

    dL/dz_j = dL/dz_c   where j is a candidate c
              dL/ds exp(z_j - s)   where j is in the tail      + dL/dz_y   where j is y

so that one buffer [C, V] is enough, which holds logits first and dL/dz last. Between them stands
e = exp(z - peak), 0 at candidates, where peak is the largest z in the tail. With Z = sum of e,
s = peak + log Z, and the entropy within the tail is log Z - sum of e log(e) / Z. ``kernels.py`` has
what is done to whole rows.

Work on the vocabulary is float32 (float64 for float64 inputs), on the K + 2 numbers float64: that
costs nothing, and in nearly certain rows they cancel. Of half-precision inputs the logits are
float32 too; the two gradient products take half-precision operands, and on a GPU the gradient of a
head's bias is a sum of them.

Extra memory: one chunk buffer (two under a soft-cap; half of one more for half-precision heads),
one float32 [V, D] gradient, and a float32 head where it differs in dtype from the hidden states.
All else works in cache-sized blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from eopd.loss.kernels import REMOVED, Derivatives, Tail, open_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from hidden states to the logits of a policy over V tokens:

        softcap(hidden_TD @ weight_VD^T * logit_scale + bias_V) / temperature

    The weight may be tied, and in any floating dtype.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0  # Cohere, Granite
    logit_softcap: float | None = None  # c of c tanh(x / c) (Gemma)
    temperature: float = 1.0  # the one that tokens are sampled at

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns dense logits [T, V], for a few tokens; ``chunked_sums`` is for many."""
        logits_TV = functional.linear(hidden_TD, self.weight_VD) * self.logit_scale
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V

        if self.logit_softcap is not None:
            logits_TV = self.logit_softcap * torch.tanh(logits_TV / self.logit_softcap)

        return logits_TV / self.temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """What sampler and teacher gave for T packed tokens. Row t of the hidden states predicts
    ``target_ids_T[t]``.

    Rows where ``loss_mask_T`` is False are never read: they may hold anything. Log-probabilities
    and entropies are in nats. A candidate at -inf is ignored, whatever its id: it is the freed slot
    of a merged end token.
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
    teacher_entropy_T: Tensor  # a diagnostic only

    def columns(self) -> dict[str, Tensor]:
        """Returns all columns that are there, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same tokens with a function applied to every column."""
        return replace(self, **{name: function(value) for name, value in self.columns().items()})

    def teacher_outcomes(self) -> Tensor:
        """Returns log-probabilities of the candidates and the rest, float64 [T, K + 1]."""
        return _outcomes(
            self.teacher_topk_logprobs_TK.double(), self.teacher_tail_logprobs_T.double()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read of a chunk's logits, float64. The first three carry all gradients."""

    target_logits_C: Tensor
    topk_logits_CK: Tensor  # of the teacher's candidates; -inf where ignored
    tail_logits_C: Tensor  # logsumexp of the logits in the tail; -inf where there are none
    tail_entropy_C: Tensor  # of the student's softmax over the tail
    top_logits_C: Tensor  # the largest of all V
    topk_overlap_C: Tensor  # share of the candidates that are also in the student's top k

    def student_outcomes(self) -> Tensor:
        """Returns student log-probabilities of candidates and tail, [C, K + 1]."""
        return _outcomes(self.topk_logits_CK, self.tail_logits_C).log_softmax(-1)

    def student_logprobs(self) -> Tensor:
        """Returns log-probabilities of the sampled tokens, [C]."""
        normalizers_C = _outcomes(self.topk_logits_CK, self.tail_logits_C).logsumexp(-1)
        return self.target_logits_C - normalizers_C

    def student_entropy(self, log_p: Tensor) -> Tensor:
        """Returns the exact full-vocabulary entropy, [C]: that of the K + 1 outcomes, which are
        ``log_p``, plus that within the last one.
        """
        entropy_of_outcomes: Tensor = torch.special.entr(log_p.exp()).sum(-1)
        return entropy_of_outcomes + log_p[:, -1].exp() * self.tail_entropy_C


def _outcomes(candidates_TK: Tensor, rest_T: Tensor) -> Tensor:
    """Returns candidates and rest as the columns of one tensor [T, K + 1]."""
    return torch.cat([candidates_TK, rest_T.unsqueeze(-1)], dim=-1)


# From a chunk to sums over its rows, float64 [N]; the first is the loss, and alone has gradients.
Measure = Callable[[Reading, LossTokens], Tensor]


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


class Gradients(NamedTuple):
    """Sums of gradients over chunks; None where one is not wanted."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """C of the loss rows, what was read of their logits, and what the way back needs."""

    rows_C: Tensor  # int: which of the T packed rows they are
    hidden_CD: Tensor
    tokens: LossTokens
    reading: Reading
    target_ids_C1: Tensor
    candidate_ids_CK: Tensor  # 0 where ignored
    is_candidate_CK: Tensor  # False where ignored
    logits_CV: Tensor  # in the shared buffer, as ``tail`` has left them
    tail: Tail


class LogitChunks:
    """Makes the logits of all loss rows, a chunk after the other, in buffers that all share.

    So the gradient of a chunk is to be taken before the next chunk is asked for.
    """

    def __init__(
        self, hidden_TD: Tensor, head: Head, tokens: LossTokens, chunk_tokens: int
    ) -> None:
        self.hidden_TD = hidden_TD
        self.head = head
        self.chunk_tokens = chunk_tokens
        self.rows_L = tokens.loss_mask_T.nonzero().squeeze(1)
        self.tokens = tokens.map(lambda column: column[self.rows_L])

        weight_VD = head.weight_VD
        any_double = torch.float64 in (weight_VD.dtype, hidden_TD.dtype)
        self.dtype = torch.float64 if any_double else torch.float32
        # Two operands of one dtype are multiplied as they are; otherwise both are brought to the
        # working dtype.
        same_dtype = weight_VD.dtype == hidden_TD.dtype
        self.operand_dtype = weight_VD.dtype if same_dtype else self.dtype
        self.operand_VD = weight_VD.to(self.operand_dtype)

        rows, has_bias = min(chunk_tokens, len(self.rows_L)), head.bias_V is not None
        self.kernels = open_kernels(self.operand_VD, rows, self.dtype, has_bias=has_bias)
        shape = (rows, len(weight_VD))
        self.capped = (
            None if head.logit_softcap is None else weight_VD.new_empty(shape, dtype=self.dtype)
        )

    def __iter__(self) -> Iterator[Chunk]:
        """Yields every chunk; a single empty one where no row counts."""
        starts = range(0, max(len(self.rows_L), 1), self.chunk_tokens)
        return (self._read(slice(start, start + self.chunk_tokens)) for start in starts)

    def _read(self, chunk: slice) -> Chunk:
        rows_C = self.rows_L[chunk]
        hidden_CD = self.hidden_TD[rows_C]
        tokens = self.tokens.map(lambda column: column[chunk])
        logits_CV = self._project(hidden_CD)
        is_candidate_CK = tokens.teacher_topk_logprobs_TK != -torch.inf
        candidate_ids_CK = tokens.teacher_topk_ids_TK.long().masked_fill(~is_candidate_CK, 0)
        target_ids_C1 = tokens.target_ids_T.long().unsqueeze(1)
        target_C = logits_CV.gather(1, target_ids_C1).squeeze(1)
        candidates_CK = logits_CV.gather(1, candidate_ids_CK)
        candidates_CK = candidates_CK.masked_fill(~is_candidate_CK, -torch.inf)

        # Added, not written: an ignored candidate may share its id with a kept one.
        logits_CV.scatter_add_(
            1,
            candidate_ids_CK,
            is_candidate_CK.to(self.dtype) * REMOVED,
        )
        top_k, vocabulary = candidate_ids_CK.shape[1], logits_CV.shape[1]
        tail = self.kernels.tail(logits_CV, top_k)
        tail_sum_C, weighted_sum_C = (
            sums_C1.squeeze(1).double() for sums_C1 in (tail.sum_C1, tail.weighted_sum_C1)
        )
        tail_C = tail.top_CK[:, 0].double() + tail_sum_C.log()
        no_tail = is_candidate_CK.sum(-1) == vocabulary
        student_top = torch.cat([candidates_CK, tail.top_CK], dim=1).topk(top_k)

        reading = Reading(
            target_logits_C=target_C.double(),
            topk_logits_CK=candidates_CK.double(),
            tail_logits_C=tail_C.masked_fill(no_tail, -torch.inf),
            tail_entropy_C=tail_sum_C.log() - weighted_sum_C / tail_sum_C,
            top_logits_C=student_top.values[:, 0].double(),
            topk_overlap_C=(student_top.indices < top_k).double().mean(-1),
        )
        return Chunk(
            rows_C=rows_C,
            hidden_CD=hidden_CD,
            tokens=tokens,
            reading=reading,
            target_ids_C1=target_ids_C1,
            candidate_ids_CK=candidate_ids_CK,
            is_candidate_CK=is_candidate_CK,
            logits_CV=logits_CV,
            tail=tail,
        )

    def add_gradients(
        self, sums: Gradients, chunk: Chunk, target_C: Tensor, topk_CK: Tensor, tail_C: Tensor
    ) -> None:
        """Adds a chunk's share to the sums, from derivatives by the first three of its reading.

        With G [C, V] the gradient by ``hidden @ W^T * scale + bias``, the shares are scale G W for
        the hidden states, scale G^T hidden for the weight W, and the sum of G's rows for the bias.
        """
        gradient_CV = self._logit_gradient(chunk, target_C, topk_CK, tail_C)
        if sums.bias_V is not None:
            sums.bias_V.add_(gradient_CV.sum(0, dtype=self.dtype))

        if self.head.logit_scale != 1.0:
            gradient_CV.mul_(self.head.logit_scale)

        operand_CV, hidden_CD = self.kernels.operand(gradient_CV), chunk.hidden_CD
        if sums.hidden_TD is not None:
            sums.hidden_TD[chunk.rows_C] = (operand_CV @ self.operand_VD).to(sums.hidden_TD.dtype)

        if sums.weight_VD is not None:
            hidden_CD = hidden_CD.to(self.operand_dtype)
            self.kernels.add_weight_gradient(sums.weight_VD, operand_CV, hidden_CD)

    def _logit_gradient(
        self, chunk: Chunk, target_C: Tensor, topk_CK: Tensor, tail_C: Tensor
    ) -> Tensor:
        """Returns the gradient by ``hidden @ weight^T * logit_scale + bias``, in place of what
        ``tail`` has left of the logits.
        """
        # The share of a sampled candidate is added in float64: of a nearly certain one, 1 - p would
        # be lost in float32.
        is_target_CK = chunk.is_candidate_CK & (chunk.candidate_ids_CK == chunk.target_ids_C1)
        merged = (
            target_C * ~is_target_CK.any(1),
            topk_CK + is_target_CK * target_C.unsqueeze(1),
            tail_C,
        )
        target_C, topk_CK, tail_C = (
            derivative.to(self.dtype) / self.head.temperature for derivative in merged
        )
        gradient_CV = self.kernels.gradient(
            chunk.logits_CV,
            chunk.tail,
            Derivatives(
                factor_C1=tail_C.unsqueeze(1) / chunk.tail.sum_C1,
                candidate_ids_CK=chunk.candidate_ids_CK,
                candidates_CK=topk_CK,
                target_ids_C1=chunk.target_ids_C1,
                target_C1=target_C.unsqueeze(1),
            ),
        )
        if self.capped is not None:  # the derivative of tanh is 1 - tanh^2
            gradient_CV.mul_(self.capped[: len(gradient_CV)].square_().neg_().add_(1.0))

        return gradient_CV

    def _project(self, hidden_CD: Tensor) -> Tensor:
        """Returns the logits of ``Head``, in the shared buffer."""
        head, logits_CV = self.head, self.kernels.project(hidden_CD)
        if head.logit_scale != 1.0:
            logits_CV.mul_(head.logit_scale)

        if head.bias_V is not None:
            logits_CV.add_(head.bias_V)

        if head.logit_softcap is not None and self.capped is not None:
            capped_CV = self.capped[: len(logits_CV)]
            torch.tanh(logits_CV.div_(head.logit_softcap), out=capped_CV)
            torch.mul(capped_CV, head.logit_softcap, out=logits_CV)

        return logits_CV if head.temperature == 1.0 else logits_CV.div_(head.temperature)
