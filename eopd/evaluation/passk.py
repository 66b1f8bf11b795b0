"""Estimators over repeated samples: unbiased pass@k, and means and changes whose standard error
respects the prompts. Pure.
"""

import math
import operator
from collections.abc import Sequence

from eopd.run.record import Measurement


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the probability that at least one of k samples is correct, estimated without bias
    from n >= k samples.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv 2107.03374, eq. 1), in exact integers
    until the one division. For k = 1 it is c / n, so the mean of ``pass_at_k(n, c, 1)`` over
    prompts is avg@n.

    Example: 4 samples, 1 correct, k = 2. Of the 6 pairs 3 hold the correct sample: 0.5.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_over_prompts(per_prompt: Sequence[float], weights: Sequence[float] = ()) -> Measurement:
    """Returns the mean of one number per prompt, and its standard error clustered by prompt.

    Samples and tokens of one prompt are not independent, so that a prompt is one cluster. For m
    prompts with numbers x_i and weights w_i the mean is sum w_i x_i / sum w_i, and its standard
    error sqrt(m / (m - 1) sum d_i^2) with d_i = w_i (x_i - mean) / sum w_i, which is what prompt i
    adds to the error (the ratio estimator: Cochran, Sampling Techniques, chapter 6; clustering as
    in Miller 2024, arXiv 2411.00640). With equal weights that is sd / sqrt(m). One prompt says
    nothing of the spread between prompts: it has no standard error.

    Args:
        per_prompt: a score, or a mean per token; of one prompt or more.
        weights: the number of tokens that each is a mean of; none where all prompts weigh the same.
    """
    mean, deviations = _deviations(per_prompt, weights)
    return Measurement(mean=mean, standard_error=_standard_error(deviations))


def change_over_prompts(
    per_prompt: Sequence[float],
    before: Sequence[float],
    weights: Sequence[float] = (),
    weights_before: Sequence[float] = (),
) -> Measurement:
    """Returns by how much the mean over the same prompts in the same order differs from the one
    before, with a standard error that is paired by prompt.

    What a prompt adds to the error is d_i - d_i before, with d_i as in ``mean_over_prompts``: what
    makes a prompt hard is in both measurements, and cancels. With equal weights that is the
    standard error of the prompts' own differences.

    Example: 0.1, 0.5 before and 0.3, 0.6 now are +0.15 with a standard error of 0.05, far below the
    0.2 and 0.15 of the two means.
    """
    mean, deviations = _deviations(per_prompt, weights)
    mean_before, deviations_before = _deviations(before, weights_before)
    changes = map(operator.sub, deviations, deviations_before)
    return Measurement(mean=mean - mean_before, standard_error=_standard_error(list(changes)))


def _deviations(
    per_prompt: Sequence[float], weights: Sequence[float]
) -> tuple[float, Sequence[float]]:
    """Returns the weighted mean, and what each prompt adds to its error."""
    weights = weights or [1.0] * len(per_prompt)
    total = math.fsum(weights)
    mean = math.fsum(map(operator.mul, weights, per_prompt)) / total
    pairs = zip(weights, per_prompt, strict=True)

    return mean, [weight * (value - mean) / total for weight, value in pairs]


def _standard_error(deviations: Sequence[float]) -> float | None:
    count = len(deviations)
    if count == 1:
        return None

    return math.sqrt(count / (count - 1) * math.fsum(each**2 for each in deviations))
