"""The numbers of a held-out measurement, from sums over tokens: means, standard errors, and entropy
histograms.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS, Estimate, EvalStats, PartStats

Float64Array = npt.NDArray[np.float64]

# The rows of a micro-batch's statistics; below them is the loss mask.
ESTIMATES: Final = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",
)
_ENTROPIES: Final = slice(2, 4)
_OF_A_PART: Final = (0, 1, 5)  # reverse KL, forward KL, loss mask


def entropy_counts(columns: Tensor) -> list[list[int]]:
    """Counts unmasked tokens by student and by teacher entropy, from statistics [6, T].

    Returns:
        Counts [2, NUM_ENTROPY_BINS]. A token whose entropy is NaN is in no bin.
    """
    kept = columns[_ENTROPIES, columns[-1] > 0] / ENTROPY_BIN_NATS
    rows = [row[~row.isnan()].clamp(0, NUM_ENTROPY_BINS - 1).long() for row in kept]
    return [torch.bincount(row, minlength=NUM_ENTROPY_BINS).tolist() for row in rows]


def token_sums(columns: Tensor, gate_T: Tensor) -> list[float]:
    """Returns the sums of a trajectory's statistics [6, T], then the sums of those in
    ``_OF_A_PART`` weighted by the gate.
    """
    weights_T = gate_T.to(columns).nan_to_num(0.0)
    return [*columns.sum(1).tolist(), *(columns[list(_OF_A_PART)] * weights_T).sum(1).tolist()]


def eval_stats(
    sums: Sequence[Sequence[float]], sources: Sequence[str], counts: Sequence[list[list[int]]]
) -> EvalStats:
    """Makes a measurement of the sums of all ranks.

    Args:
        sums: ``token_sums`` of each trajectory.
        sources: the source of each trajectory's prompt.
        counts: ``entropy_counts`` of each micro-batch.
    """
    sums_MS, unsure_MS = np.split(np.array(sums), [len(ESTIMATES) + 1], axis=1)
    counts_M = sums_MS[:, -1]
    student, teacher = np.sum(counts, axis=0).tolist()

    return EvalStats(
        **{name: cluster_estimate(sums_MS[:, i], counts_M) for i, name in enumerate(ESTIMATES)},
        student_entropy_counts=tuple(student),
        teacher_entropy_counts=tuple(teacher),
        parts=_parts(sums_MS[:, list(_OF_A_PART)], unsure_MS, np.array(sources)),
        num_trajectories=len(counts_M),
        num_tokens=round(counts_M.sum()),
        num_dropped=0,
    )


def _parts(
    sums_MS: Float64Array, unsure_MS: Float64Array, sources_M: npt.NDArray[np.str_]
) -> dict[str, PartStats]:
    """Makes the parts of a measurement.

    The sums are of reverse KL, forward KL and tokens of each trajectory: over all tokens, and over
    those where the teacher is unsure.
    """
    parts = {"teacher unsure": unsure_MS, "teacher sure": sums_MS - unsure_MS}
    if len(names := np.unique(sources_M)) > 1:
        parts |= {f"source {name}": sums_MS * (sources_M == name)[:, None] for name in names}

    return {
        name: PartStats(
            share=float(part_MS[:, 2].sum() / sums_MS[:, 2].sum()),
            reverse_kl=cluster_estimate(part_MS[:, 0], part_MS[:, 2]),
            forward_kl=cluster_estimate(part_MS[:, 1], part_MS[:, 2]),
        )
        for name, part_MS in parts.items()
        if part_MS[:, 2].sum() > 0
    }


def cluster_estimate(sums_M: Float64Array, counts_M: Float64Array) -> Estimate:
    """Returns the mean per token and its standard error, with each trajectory as one cluster.

    The ratio estimator: mean = sum s / sum n, and se = sqrt(m / (m - 1) sum (s_i - mean n_i)^2) /
    sum n for m trajectories with sums s_i over n_i tokens (Cochran, Sampling Techniques, chapter
    6). Infinite for one trajectory, which shows no spread.
    """
    mean = sums_M.sum() / counts_M.sum()
    num_clusters = len(counts_M)
    if num_clusters < 2:
        return Estimate(mean=float(mean), standard_error=math.inf)

    spread = np.sum((sums_M - mean * counts_M) ** 2) * num_clusters / (num_clusters - 1)
    return Estimate(mean=float(mean), standard_error=float(np.sqrt(spread) / counts_M.sum()))
