"""A fractional reward."""

from collections.abc import Mapping, Sequence
from typing import Any


def score(
    row: Mapping[str, Any], response: str, response_ids: Sequence[int], *, floor: float = 0.0
) -> float:
    """Returns the share of the letters in the row's column ``letters`` that the response has.

    Example: of the letters a, e, o and t the response "a note" has four: 1.0. No response gets less
    than ``floor``.
    """
    wanted = row["letters"]
    found = sum(letter in response.lower() for letter in wanted)
    return max(floor, found / len(wanted))
