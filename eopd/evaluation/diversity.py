"""How much the responses to one prompt differ. Pure."""

import math
from collections.abc import Sequence


def distinct_ratio(responses: Sequence[Sequence[int]], n: int) -> float:
    """Returns distinct-n: the share of different n-grams among all n-grams of the responses to one
    prompt, in 0..1; nan where no response has n tokens.

    Li et al. 2016, arXiv 1510.03055, section 5.2, on token ids. It falls when a response repeats
    itself, and when the responses repeat one another.

    Example: ``[[1, 2, 1], [1, 2]]`` has the 2-grams 12, 21, 12, of which two differ: 2/3.
    """
    grams = [
        tuple(response[start : start + n])
        for response in responses
        for start in range(len(response) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else math.nan
