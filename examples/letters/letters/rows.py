"""A data set that is made, and not read."""

from collections.abc import Iterator
from itertools import combinations


def tasks(
    *, letters: str = "aeinorst", count: int = 4, most: int = 32
) -> Iterator[dict[str, object]]:
    """Yields a task for each choice of ``count`` of the ``letters``, at most ``most`` of them.

    Example: the first task of "abc" and a count of 2 has ``["a", "b"]`` in the column ``letters``.
    """
    for number, chosen in enumerate(combinations(letters, count)):
        if number == most:
            return

        yield {
            "id": f"task-{number}",
            "prompt": f"Write a text that has the letters {', '.join(chosen)}.",
            "letters": list(chosen),
            "answer": "".join(chosen),
        }
