"""Estimators over repeated samples: unbiased pass@k, and means whose standard error respects
the prompts. Pure.
"""

import math
from collections.abc import Sequence

from eopd.types import Estimate


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the probability that at least one of k samples is correct, estimated without bias
    from n >= k samples.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv 2107.03374, eq. 1), in exact integers
    until the one division. For k = 1 it is c / n, so the mean of ``pass_at_k(n, c, 1)`` over
    prompts is avg@n.

    Example: 4 samples, 1 correct, k = 2. Of the 6 pairs 3 hold the correct sample: 0.5.

    Raises:
        ValueError: c is outside 0..n, or k outside 1..n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"num_correct {num_correct} must lie in 0..{num_samples}, the number of samples"
        )

    if not 1 <= k <= num_samples:
        raise ValueError(f"k {k} must lie in 1..{num_samples}, the number of samples")

    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_over_prompts(per_prompt: Sequence[float]) -> Estimate:
    """Returns the mean of one number per prompt, and its standard error clustered by prompt.

    Samples of one prompt are not independent. With equally many samples per prompt the clustered
    standard error is that of the prompts' own means, ``sd / sqrt(prompts)`` with the n - 1 form of
    sd (clustering as in Miller 2024, arXiv 2411.00640). One prompt says nothing of the spread
    between prompts: its standard error is nan.

    Raises:
        ValueError: there is no prompt.
    """
    count = len(per_prompt)
    if count == 0:
        raise ValueError("a mean over prompts needs at least one prompt")

    mean = math.fsum(per_prompt) / count
    if count == 1:
        return Estimate(mean=mean, standard_error=math.nan)

    variance = math.fsum((value - mean) ** 2 for value in per_prompt) / (count - 1)

    return Estimate(mean=mean, standard_error=math.sqrt(variance / count))
