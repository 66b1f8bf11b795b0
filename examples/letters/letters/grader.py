"""A grader for ``eopd eval`` and for benchmarks."""


def has_all(response: str, reference: str | tuple[str, ...]) -> bool | None:
    """Returns whether a response has every letter of the accepted answer, such as "aeot".

    Of several accepted answers any one will do. An empty response is no answer.
    """
    if not response.strip():
        return None

    accepted = [reference] if isinstance(reference, str) else reference
    return any(set(answer) <= set(response.lower()) for answer in accepted)
