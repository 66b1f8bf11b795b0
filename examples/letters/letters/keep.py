"""A filter on the tokens of a response."""

from eopd.plugins import Scored


def varied(scored: Scored, *, share: float = 0.5) -> bool:
    """Returns whether at least a ``share`` of the response's tokens are different ones."""
    ids = scored.response_ids.tolist()
    return len(set(ids)) >= share * len(ids)
