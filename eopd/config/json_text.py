"""JSON text to values, and values in the words of JSON; what is wrong is said without a word
of Python.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal

Pairs = list[tuple[str, object]]


class JsonError(Exception):
    """A text that is no JSON, with the place and what is wrong there, as the end of a
    sentence that names it.
    """


def parse_json(text: str | bytes, hook: Callable[[Pairs], object] | None = None) -> object:
    """Reads the value that a JSON text holds; ``hook`` makes an object of its fields.

    Raises:
        JsonError: the text holds no value, or one that nobody can read.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        if decoded.startswith("\ufeff"):
            raise JsonError(
                "begins with a byte order mark, which JSON has not; save it as UTF-8 without one"
            )

        value: object = json.loads(decoded, object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = (
            f"column {error.colno}"
            if "\n" not in decoded.strip()
            else f"line {error.lineno}, column {error.colno}"
        )
        hint = "; a backslash of a text is written twice" if "escape" in error.msg else ""
        raise JsonError(f"is not JSON: {error.msg} ({place}){hint}") from None
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        raise JsonError(
            f"holds a number of more than {limit} digits; write it as text, in quotes"
        ) from None

    return value


def told(value: object) -> str:
    """Names a value in the words of JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]

    if isinstance(value, int):
        return f"the number {value}" if abs(value) < 10**60 else "a number of more than 60 digits"

    if isinstance(value, float | Decimal):
        return (
            f"the number {value}"
            if math.isfinite(value)
            else "a number that is not finite (NaN or Infinity)"
        )

    if isinstance(value, str):
        return json.dumps(value)[:60] if value.strip() else "empty text"

    if isinstance(value, list):
        return "a list" if value else "an empty list"

    return "an object" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"
