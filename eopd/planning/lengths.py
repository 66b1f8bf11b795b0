"""Response lengths for a simulation: lognormal, cut at the longest that a run allows."""

import math
from statistics import NormalDist
from typing import Final

_NORMAL: Final = NormalDist()
_SEEDS: Final = 1 << 31  # of ``types.Sampling``: below that, all equally likely


class Lengths:
    """Lengths in tokens, the same for the same seed. Their mean is ``mean`` after the cut at ``most``:
    with ``sigma`` 0, or where the mean is the most, all are equal.

    Args:
        mean: of the lengths as they are written, in tokens; at most ``most``.
        sigma: the standard deviation of the logarithm of the lengths before the cut.
        most: the longest response, in tokens.
    """

    def __init__(self, mean: float, sigma: float, most: int) -> None:
        self.mean, self.sigma, self._most = mean, sigma, most
        self._mu = math.inf if mean >= most else _mu(mean, sigma, most)

    def of(self, seed: int) -> int:
        """Returns the length of the response that is sampled with a seed, in tokens, at least 1."""
        if math.isinf(self._mu):
            return self._most

        deviates = _NORMAL.inv_cdf((seed + 0.5) / _SEEDS)
        return max(1, min(self._most, round(math.exp(self._mu + self.sigma * deviates))))


def _mu(mean: float, sigma: float, most: int) -> float:
    """Returns the mean of the logarithms with which the mean of the cut lengths is ``mean``."""
    if sigma == 0.0:
        return math.log(mean)

    low, high = math.log(mean), math.log(mean) + 1.0
    low -= sigma * sigma  # the mean without a cut is exp(mu + sigma^2 / 2), and a cut makes it less
    while _cut_mean(high, sigma, most) < mean:
        high += 1.0

    for _ in range(60):
        middle = (low + high) / 2.0
        if _cut_mean(middle, sigma, most) < mean:
            low = middle
        else:
            high = middle

    return high


def _cut_mean(mu: float, sigma: float, most: int) -> float:
    """Returns the mean of min(X, most), X lognormal."""
    at = (math.log(most) - mu) / sigma
    whole = math.exp(mu + sigma * sigma / 2.0) * _NORMAL.cdf(at - sigma)
    return whole + most * (1.0 - _NORMAL.cdf(at))
