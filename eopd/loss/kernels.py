"""What is done to a chunk's logits [C, V], in the way that suits the device.

    project     logits = hidden @ W^T
    tail        the largest logits of a row, the sums of e = exp(logit - largest) and of e log(e)
    gradient    exp(logit - largest) * factor, with what the few tokens that are named add
    add_weight  W's gradient += gradient^T @ hidden

A CPU's caches hold a few rows: operations work on blocks of them, and exponentials take the place of
logits, so that none is computed twice. On a GPU starting an operation costs more than computing an
exponential, and memory is what it waits for: torch compiles ``tail`` and ``gradient`` into three
kernels, which read the logits once each, and the last writes the operand of the products that follow.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Added to the candidates' logits to take them out of the tail: far below any logit, yet finite,
# since 0 x inf is NaN.
REMOVED = -1e30

# Rows to a block that stays in a CPU's cache: of logits, and of the head.
_LOGIT_BLOCK_ROWS, _HEAD_BLOCK_ROWS = 16, 2048

# Columns of logits that one reduction on a GPU takes; rows are padded to a multiple of it.
_BLOCK_COLUMNS = 64

# Rows of logits that a chunk has on a CPU, and the least and most on a GPU.
_CPU_CHUNK_TOKENS, _LEAST_CHUNK_TOKENS, _MOST_CHUNK_TOKENS = 256, 256, 4096

# What the buffers of a chunk may take of a GPU's memory, and what a logit takes in them.
_CHUNK_SHARE, _LOGIT_BYTES = 1 / 32, 6


def choose_chunk_tokens(vocabulary: int, *, gpu_bytes: int | None) -> int:
    """Returns the rows of a chunk where the config leaves them to the program.

    On a GPU a chunk costs about 180 operations, however large it is, so it is as large as its memory
    allows: on an H200 with V = 151,936, 8,192 tokens took 163 ms in chunks of 256 rows, and 24 ms in
    chunks of 2,048 (``tests/bench/bench_loss.py``).

    Args:
        vocabulary: the columns.
        gpu_bytes: all memory of the GPU; None on a CPU.

    Returns:
        On a GPU the largest power of two from 256 to 4,096 with which logits and their gradient
        take at most a 32nd of its memory.
    """
    if gpu_bytes is None:
        return _CPU_CHUNK_TOKENS

    rows = int(_CHUNK_SHARE * gpu_bytes) // (_LOGIT_BYTES * vocabulary)
    power = 1 << max(rows.bit_length() - 1, 0)
    return min(max(power, _LEAST_CHUNK_TOKENS), _MOST_CHUNK_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What is read of the tail of C rows of logits."""

    top_CK: Tensor  # the largest logits, in descending order
    sum_C1: Tensor  # of e = exp(logit - top)
    weighted_sum_C1: Tensor  # of e log(e)


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivatives:
    """Of the loss by C rows of logits: ``factor`` times e in the tail, and more at some tokens."""

    factor_C1: Tensor
    candidate_ids_CK: Tensor
    candidates_CK: Tensor
    target_ids_C1: Tensor
    target_C1: Tensor  # 0 where the target is a candidate, which has its share then


class CpuKernels:
    """Blocks of rows that stay in a cache. After ``tail`` the logits are exponentials."""

    def __init__(self, weight_VD: Tensor, rows: int, dtype: torch.dtype, *, has_bias: bool) -> None:
        self._weight_VD, self._dtype, self._has_bias = weight_VD, dtype, has_bias
        self._logits = weight_VD.new_empty((rows, len(weight_VD)), dtype=dtype)
        self._shifted = torch.empty_like(self._logits[:_LOGIT_BLOCK_ROWS])
        is_half = weight_VD.dtype != dtype
        self._operand = torch.empty_like(self._logits, dtype=weight_VD.dtype) if is_half else None
        starts = range(0, len(weight_VD), _HEAD_BLOCK_ROWS)
        self._head_blocks = [slice(start, start + _HEAD_BLOCK_ROWS) for start in starts]

    def project(self, hidden_CD: Tensor) -> Tensor:
        """Returns ``hidden @ W^T`` [C, V] in the working dtype; overwrites the chunk before."""
        logits_CV = self._logits[: len(hidden_CD)]
        hidden_CD = hidden_CD.to(self._dtype)

        for block in self._head_blocks:
            weight = self._weight_VD[block].to(self._dtype)
            torch.mm(hidden_CD, weight.t(), out=logits_CV[:, block])

        return logits_CV

    def tail(self, logits_CV: Tensor, top_k: int) -> Tail:
        """Reads all logits, and leaves e = exp(logit - largest) instead."""
        top_CK = logits_CV.topk(top_k).values
        peak_C1 = top_CK[:, :1]
        sum_C1, weighted_sum_C1 = torch.empty_like(peak_C1), torch.empty_like(peak_C1)

        for start in range(0, len(logits_CV), _LOGIT_BLOCK_ROWS):
            rows = slice(start, start + _LOGIT_BLOCK_ROWS)
            block_BV = logits_CV[rows]
            shifted_BV = self._shifted[: len(block_BV)]
            torch.sub(block_BV, peak_C1[rows], out=shifted_BV)
            sum_C1[rows] = torch.exp(shifted_BV, out=block_BV).sum(-1, keepdim=True)
            if self._has_bias:
                # a bias of -inf makes tokens impossible, and 0 x inf is NaN
                shifted_BV.clamp_(min=REMOVED)

            weighted_sum_C1[rows] = shifted_BV.mul_(block_BV).sum(-1, keepdim=True)

        return Tail(top_CK=top_CK, sum_C1=sum_C1, weighted_sum_C1=weighted_sum_C1)

    def gradient(self, logits_CV: Tensor, tail: Tail, derivatives: Derivatives) -> Tensor:
        """Returns the gradient [C, V] in the working dtype, in place of what ``tail`` has left."""
        gradient_CV = logits_CV.mul_(derivatives.factor_C1)
        gradient_CV.scatter_add_(1, derivatives.candidate_ids_CK, derivatives.candidates_CK)
        return gradient_CV.scatter_add_(1, derivatives.target_ids_C1, derivatives.target_C1)

    def operand(self, gradient_CV: Tensor) -> Tensor:
        """Returns the gradient in the dtype in which it is multiplied, that of the weight."""
        if self._operand is None:
            return gradient_CV

        return self._operand[: len(gradient_CV)].copy_(gradient_CV)

    def add_weight_gradient(self, sums_VD: Tensor, operand_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds ``operand^T @ hidden`` to sums in the working dtype."""
        for block in self._head_blocks:
            if self._operand is None:
                sums_VD[block].addmm_(operand_CV[:, block].t(), hidden_CD)
            else:
                sums_VD[block].add_(operand_CV[:, block].t() @ hidden_CD)


class CudaKernels:
    """Whole chunks, two compiled kernels, products that accumulate in the working dtype.

    Rows are padded with logits that have no probability.
    """

    def __init__(self, weight_VD: Tensor, rows: int, dtype: torch.dtype) -> None:
        self._weight_VD, self._dtype = weight_VD, dtype
        self._is_half = weight_VD.dtype != dtype
        self._vocabulary = len(weight_VD)
        shape = (rows, -(-self._vocabulary // _BLOCK_COLUMNS) * _BLOCK_COLUMNS)
        self._padded = weight_VD.new_empty(shape, dtype=dtype)
        # In full precision the gradient takes the place of the logits.
        self._gradient = weight_VD.new_empty(shape if self._is_half else (0, 0))

    def project(self, hidden_CD: Tensor) -> Tensor:
        """Returns ``hidden @ W^T`` [C, V] in the working dtype; overwrites the chunk before."""
        logits_CV = self._padded[: len(hidden_CD), : self._vocabulary]
        if self._is_half:
            return torch.mm(hidden_CD, self._weight_VD.t(), out_dtype=self._dtype, out=logits_CV)

        return torch.mm(hidden_CD.to(self._dtype), self._weight_VD.t(), out=logits_CV)

    def tail(self, logits_CV: Tensor, top_k: int) -> Tail:
        """Reads all logits, and leaves them as they are."""
        rows = self._padded[: len(logits_CV)]
        rows[:, self._vocabulary :] = REMOVED
        peaks_CB, sums_CB, weighted_CB = _on(rows.device, _block_tails)(rows)

        # The largest k of a row lie in the k blocks with the largest peaks.
        blocks = peaks_CB.topk(min(top_k, peaks_CB.shape[1])).indices
        blocks = blocks.unsqueeze(-1).expand(-1, -1, _BLOCK_COLUMNS)
        top_CK = _in_blocks(rows).gather(1, blocks).flatten(1).topk(top_k).values

        shifts_CB = peaks_CB - top_CK[:, :1]
        scales_CB = shifts_CB.exp()
        sums_CB = sums_CB * scales_CB
        weighted_CB = weighted_CB * scales_CB + sums_CB * shifts_CB

        return Tail(
            top_CK=top_CK,
            sum_C1=sums_CB.sum(-1, keepdim=True),
            weighted_sum_C1=weighted_CB.sum(-1, keepdim=True),
        )

    def gradient(self, logits_CV: Tensor, tail: Tail, derivatives: Derivatives) -> Tensor:
        """Returns the gradient [C, V] in the dtype in which it is multiplied.

        In full precision it takes the place of the logits.
        """
        peak_C1, factor_C1 = tail.top_CK[:, :1], derivatives.factor_C1
        # The target's is added up before it is rounded; removed candidates have 0 until then.
        target_C1 = logits_CV.gather(1, derivatives.target_ids_C1)
        target_C1 = (target_C1 - peak_C1).exp() * factor_C1 + derivatives.target_C1

        padded = self._padded[: len(logits_CV)]
        gradient = self._gradient[: len(logits_CV)] if self._is_half else padded
        _on(padded.device, _tail_gradient)(padded, peak_C1, factor_C1, gradient)
        gradient_CV = gradient[:, : self._vocabulary]
        gradient_CV.scatter_(1, derivatives.target_ids_C1, target_C1.to(gradient.dtype))

        return gradient_CV.scatter_add_(
            1, derivatives.candidate_ids_CK, derivatives.candidates_CK.to(gradient.dtype)
        )

    def operand(self, gradient_CV: Tensor) -> Tensor:
        """Returns the gradient as it is: ``gradient`` has made it in the right dtype."""
        return gradient_CV

    def add_weight_gradient(self, sums_VD: Tensor, operand_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds ``operand^T @ hidden`` to sums in the working dtype."""
        if self._is_half:
            torch.addmm(sums_VD, operand_CV.t(), hidden_CD, out_dtype=self._dtype, out=sums_VD)
        else:
            sums_VD.addmm_(operand_CV.t(), hidden_CD)


Kernels = CpuKernels | CudaKernels


def open_kernels(weight_VD: Tensor, rows: int, dtype: torch.dtype, *, has_bias: bool) -> Kernels:
    """Returns the kernels of the device on which a head's weight lies.

    Args:
        weight_VD: in the dtype in which it is multiplied.
        rows: the most of a chunk.
        dtype: in which logits are computed.
        has_bias: a bias is added to them, which may be -inf.
    """
    if weight_VD.is_cuda:
        return CudaKernels(weight_VD, rows, dtype)

    return CpuKernels(weight_VD, rows, dtype, has_bias=has_bias)


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, dynamic=True)


def _on(device: torch.device, function: Callable[P, R]) -> Callable[P, R]:
    """Returns a function as one kernel; as it is where there is no GPU, for tests."""
    return _compiled(function) if device.type == "cuda" else function


def _in_blocks(logits_CV: Tensor) -> Tensor:
    rows, columns = logits_CV.shape
    return logits_CV.view(rows, columns // _BLOCK_COLUMNS, _BLOCK_COLUMNS)


def _block_tails(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of each block of columns the largest logit, and the sums of e = exp(logit - largest)
    and of e log(e), each [C, B].
    """
    # A bias of -inf makes tokens impossible, and a block of them alone has no largest logit.
    blocks = _in_blocks(logits_CV).clamp(min=REMOVED)
    peaks_CB = blocks.amax(-1)
    shifted = blocks - peaks_CB.unsqueeze(-1)
    exponentials = shifted.exp()
    return peaks_CB, exponentials.sum(-1), (exponentials * shifted).sum(-1)


def _tail_gradient(logits_CV: Tensor, peak_C1: Tensor, factor_C1: Tensor, out_CV: Tensor) -> None:
    out_CV.copy_((logits_CV - peak_C1).exp() * factor_C1)
