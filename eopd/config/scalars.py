"""Unquoted YAML scalars, and what they mean: ``12345``, ``no``, ``1e-5``, ``2024_01``.

YAML 1.1 and 1.2 read some of them differently (``no``, ``010``, ``1:30``). A scalar therefore stays
the text that it is, ``Plain``, until the key that it belongs to says what is wanted there.
"""

import re
from typing import Final


class Plain(str):
    """The text of a scalar that stands without quotes."""

    __slots__ = ()


Native = bool | int | float | str | None

NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
TRUTHS: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
OLD_TRUTHS: Final = {  # of YAML 1.1; texts in YAML 1.2
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), False),
}

_MOST_DIGITS: Final = 400  # a longer one is no number of anything, and costs time
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"([-+]?)(0x[0-9a-fA-F]+|0o[0-7]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_BINARY = re.compile(r"[-+]?0b[01_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")


def native(text: str) -> Native:
    """What a scalar is in YAML 1.2: null, true or false, a number, or else text."""
    if text in NULLS:
        return None
    if text in TRUTHS:
        return TRUTHS[text]
    value = number(text)
    return str(text) if value is None else value


def number(text: str) -> int | float | None:
    """The number that a scalar is in YAML 1.2, or None."""
    if len(text) > _MOST_DIGITS:
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if based := _OTHER_BASE.fullmatch(text):
        return int(based[1] + based[2], 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _NOT_FINITE.fullmatch(text):
        return float(f"{infinite[1] or ''}inf") if infinite[2] else float("nan")
    return None


def meant_number(text: str) -> int | float | None:
    """The number that is meant where one is wanted: digits may be grouped as in ``1_000``."""
    if "_" in text and _GROUPED.fullmatch(text) and not _OCTAL.fullmatch(text):
        return number(text.replace("_", ""))
    return number(text)


def two_readings(text: str) -> str | None:
    """What YAML 1.1 makes of a scalar that is another number in YAML 1.2, or None."""
    if _OCTAL.fullmatch(text):
        return f"{text} is octal in YAML 1.1, for its leading zero: write it without"
    if _BASE_60.fullmatch(text):
        return f"{text} is a number of base 60 in YAML 1.1: write it in digits alone"
    if _BINARY.fullmatch(text):
        return f"{text} is a number of base 2 in YAML 1.1: write it in base 10"
    return None


def unclear(text: str) -> str | None:
    """Why nobody can say what a scalar is where anything may stand, or None."""
    if text in OLD_TRUTHS:
        truth = str(OLD_TRUTHS[text]).lower()
        return f"{text} is {truth} in YAML 1.1 and text in YAML 1.2: write {truth}, or '{text}' in quotes"
    if reason := two_readings(text):
        return f"{reason}, or quote it if it is text"
    if text == "None":
        return "None is text in YAML: write null, or 'None' in quotes"
    if "_" in text and _GROUPED.fullmatch(text):
        plain = text.replace("_", "")
        return f"{text} is a number in YAML 1.1 and text in YAML 1.2: write {plain}, or '{text}' in quotes"
    return None
