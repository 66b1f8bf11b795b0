"""The logits of one chunk of rows: what the objective reads of them, and the gradient back.

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
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eopd.loss.forward_kl import outcomes
from eopd.loss.inputs import Head, LossTokens
from eopd.loss.kernels import REMOVED, Derivatives, Tail, open_kernels


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
        return outcomes(self.topk_logits_CK, self.tail_logits_C).log_softmax(-1)

    def student_logprobs(self) -> Tensor:
        """Returns log-probabilities of the sampled tokens, [C]."""
        normalizers_C = outcomes(self.topk_logits_CK, self.tail_logits_C).logsumexp(-1)
        return self.target_logits_C - normalizers_C

    def student_entropy(self, log_p: Tensor) -> Tensor:
        """Returns the exact full-vocabulary entropy, [C]: that of the K + 1 outcomes, which are
        ``log_p``, plus that within the last one.
        """
        entropy_of_outcomes: Tensor = torch.special.entr(log_p.exp()).sum(-1)
        return entropy_of_outcomes + log_p[:, -1].exp() * self.tail_entropy_C


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


class Gradients(NamedTuple):
    """Sums of gradients over chunks; None where one is not wanted."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


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
