"""The numbers of a held-out measurement, from statistics of tokens: means of every prompt, and
entropy histograms. What they say of all prompts is left to ``evaluation/summary.py``.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS, ByPrompt, EvalStats

Float64Array = npt.NDArray[np.float64]

# The rows of ``token_statistics`` after the first; the last one is 1, whose sum counts tokens.
COLUMNS: Final = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",
    "tokens",
)
_ENTROPIES: Final = slice(2, 4)
_OF_A_PART: Final = (0, 1, 5)  # reverse KL, forward KL, tokens


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
    sums: Sequence[Sequence[float]],
    prompts: Sequence[tuple[str, str]],
    counts: Sequence[list[list[int]]],
) -> EvalStats:
    """Makes a measurement of the sums of all ranks. It does not depend on their order. A prompt whose
    numbers are not all finite is dropped, as a step is skipped in training.

    Args:
        sums: ``token_sums`` of each trajectory; those of one prompt are added up.
        prompts: id and source of each trajectory's prompt.
        counts: ``entropy_counts`` of each trajectory.
    """
    pairs = sorted(set(prompts))
    places = {pair: place for place, pair in enumerate(pairs)}
    sums_PS = np.zeros((len(pairs), len(COLUMNS) + len(_OF_A_PART)))
    counts_P2N = np.zeros((len(pairs), 2, NUM_ENTROPY_BINS), np.int64)
    for pair, row_S, counts_2N in zip(prompts, sums, counts, strict=True):
        sums_PS[places[pair]] += row_S
        counts_P2N[places[pair]] += counts_2N

    is_finite_P = [bool(np.isfinite(sums_S).all()) for sums_S in sums_PS]
    student, teacher = counts_P2N[is_finite_P].sum(0).tolist()
    measured = [pair for pair, is_finite in zip(pairs, is_finite_P, strict=True) if is_finite]
    names, sources = [name for name, _ in measured], [source for _, source in measured]

    return EvalStats(
        by_prompt=_by_prompt(sums_PS[is_finite_P], names, sources),
        student_entropy_counts=tuple(student),
        teacher_entropy_counts=tuple(teacher),
        num_dropped=len(pairs) - len(measured),
    )


def _by_prompt(sums_PS: Float64Array, names: Sequence[str], sources: Sequence[str]) -> ByPrompt:
    whole_PS, unsure_PS = np.split(sums_PS, [len(COLUMNS)], axis=1)
    all_PS = whole_PS[:, list(_OF_A_PART)]
    numbers = _means("", COLUMNS, names, whole_PS)

    parts = {"teacher unsure": (names, unsure_PS), "teacher sure": (names, all_PS - unsure_PS)}
    if len(several := sorted(set(sources))) > 1:
        for source in several:
            rows = [row for row, of_prompt in enumerate(sources) if of_prompt == source]
            parts[f"source {source}"] = ([names[row] for row in rows], all_PS[rows])

    columns = [COLUMNS[column] for column in _OF_A_PART]
    for part, (of_part, part_PS) in parts.items():
        if part_PS[:, -1].sum() > 0:
            numbers |= _means(f": {part}", columns, of_part, part_PS)

    return numbers


def _means(
    ending: str, columns: Sequence[str], names: Sequence[str], sums_PS: Float64Array
) -> dict[str, dict[str, float]]:
    """Returns the means per token of every prompt, by column with an ending, and its tokens, which
    are the last column.
    """
    tokens_P1 = sums_PS[:, -1:]
    means_PS = np.divide(sums_PS, tokens_P1, out=np.zeros_like(sums_PS), where=tokens_P1 > 0)
    means_PS[:, -1:] = tokens_P1
    return {
        f"{column}{ending}": dict(zip(names, means_P.tolist(), strict=True))
        for column, means_P in zip(columns, means_PS.T, strict=True)
    }
