"""From sums over tokens to what a held-out measurement says: means, standard errors, entropy histograms."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS, Estimate, EvalStats

Float64Array = npt.NDArray[np.float64]

# The rows of a micro-batch's statistics; below them is the loss mask.
ESTIMATES: Final = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
_ENTROPIES: Final = slice(2, 4)


def entropy_counts(columns: Tensor) -> list[list[int]]:
    """Unmasked tokens by student and by teacher entropy, [2, NUM_ENTROPY_BINS]; from statistics [6, T].

    A token of no number is in no bin.
    """
    kept = columns[_ENTROPIES, columns[-1] > 0] / ENTROPY_BIN_NATS
    rows = [row[~row.isnan()].clamp(0, NUM_ENTROPY_BINS - 1).long() for row in kept]
    return [torch.bincount(row, minlength=NUM_ENTROPY_BINS).tolist() for row in rows]


def eval_stats(sums: Sequence[Sequence[float]], counts: Sequence[list[list[int]]]) -> EvalStats:
    """What all ranks found: ``sums`` of the statistics, [6] a trajectory, ``counts`` of each micro-batch, [2, B]."""
    sums_MS = np.array(sums)
    counts_M = sums_MS[:, -1]
    student, teacher = np.sum(counts, axis=0).tolist()
    return EvalStats(
        **{name: cluster_estimate(sums_MS[:, i], counts_M) for i, name in enumerate(ESTIMATES)},
        student_entropy_counts=tuple(student),
        teacher_entropy_counts=tuple(teacher),
        num_trajectories=len(counts_M),
        num_tokens=round(counts_M.sum()),
    )


def cluster_estimate(sums_M: Float64Array, counts_M: Float64Array) -> Estimate:
    """Mean per token and its standard error, where the tokens of a trajectory are one cluster.

    The ratio estimator: mean = sum s / sum n, and se = sqrt(m / (m - 1) sum (s_i - mean n_i)^2) / sum n for m
    trajectories with sums s_i over n_i tokens (Cochran, Sampling Techniques, chapter 6). Infinite for one trajectory,
    which shows no spread.
    """
    mean = sums_M.sum() / counts_M.sum()
    num_clusters = len(counts_M)
    if num_clusters < 2:
        return Estimate(mean=float(mean), standard_error=math.inf)
    spread = np.sum((sums_M - mean * counts_M) ** 2) * num_clusters / (num_clusters - 1)
    return Estimate(mean=float(mean), standard_error=float(np.sqrt(spread) / counts_M.sum()))
