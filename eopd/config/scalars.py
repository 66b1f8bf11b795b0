"""Unquoted YAML scalars, and what they mean: ``12345``, ``no``, ``1e-5``, ``2024_01``.

YAML 1.1 and 1.2 read some of them differently (``no``, ``010``, ``1:30``). A scalar therefore stays
the text that it is, ``Plain``, until the key that it belongs to says what is wanted there.
"""

import re
import typing
from typing import Final


class Plain(str):
    """The text of a scalar that stands without quotes; ``comment`` is what follows it in its
    line, from # on.
    """

    __slots__ = ("comment",)
    comment: str

    def __new__(cls, text: str, comment: str = "") -> typing.Self:  # noqa: D102
        scalar = super().__new__(cls, text)
        scalar.comment = comment
        return scalar


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
_MARK = re.compile(r"####(?!#)")  # of a final answer, in GSM8K
_SEVERAL = re.compile(r"##")


def native(text: str) -> Native:
    """Returns what a scalar is in YAML 1.2: null, true or false, a number, or else text."""
    if text in NULLS:
        return None

    if text in TRUTHS:
        return TRUTHS[text]

    value = number(text)
    return str(text) if value is None else value


def number(text: str) -> int | float | None:
    """Returns the number that a scalar is in YAML 1.2, or None."""
    if len(text) > _MOST_DIGITS:
        return None

    if _INTEGER.fullmatch(text):
        return int(text)

    if match := _OTHER_BASE.fullmatch(text):
        return int(match[1] + match[2], 0)

    if _FLOAT.fullmatch(text):
        return float(text)

    if infinite := _NOT_FINITE.fullmatch(text):
        return float(f"{infinite[1] or ''}inf") if infinite[2] else float("nan")

    return None


def meant_number(text: str) -> int | float | None:
    """Returns the number of a scalar where one is wanted: digits may be grouped as in ``1_000``."""
    if "_" in text and _GROUPED.fullmatch(text) and not _OCTAL.fullmatch(text):
        return number(text.replace("_", ""))

    return number(text)


def two_readings(text: str) -> str | None:
    """Says what YAML 1.1 makes of a scalar that is another number in YAML 1.2; else None."""
    if _OCTAL.fullmatch(text):
        return f"{text} is octal in YAML 1.1, for its leading zero: write it without"

    if _BASE_60.fullmatch(text):
        return f"{text} is a number of base 60 in YAML 1.1: write it in digits alone"

    if _BINARY.fullmatch(text):
        return f"{text} is a number of base 2 in YAML 1.1: write it in base 10"

    return None


def unclear(text: str) -> str | None:
    """Says why nobody can tell what a scalar is where anything may stand; else None."""
    if text in OLD_TRUTHS:
        truth = str(OLD_TRUTHS[text]).lower()
        return (
            f"{text} is {truth} in YAML 1.1 and text in YAML 1.2: write {truth}, or '{text}' "
            "in quotes"
        )

    if reason := two_readings(text):
        return f"{reason}, or quote it if it is text"

    if text == "None":
        return "None is text in YAML: write null, or 'None' in quotes"

    if "_" in text and _GROUPED.fullmatch(text):
        plain = text.replace("_", "")
        return (
            f"{text} is a number in YAML 1.1 and text in YAML 1.2: write {plain}, or "
            f"'{text}' in quotes"
        )

    return None


def cut_short(text: Plain) -> str | None:
    """Says why the comment behind a text is surely meant to be more of it; else None.

    A comment begins with one # as a rule. Several behind words, or in the place of a text, and the
    four of a final answer behind anything, are what YAML takes away from a text without quotes.
    """
    in_words = not text or len(text.split()) > 1
    if not (_MARK.match(text.comment) or (in_words and _SEVERAL.match(text.comment))):
        return None

    marks = text.comment[: len(text.comment) - len(text.comment.lstrip("#"))]
    place = f"behind {text}" if text else "at its beginning"

    return (
        f"{marks} {place} begins a comment in YAML, so that the rest of the line is no part "
        "of the text; put quotes around all of the text, or write the comment with one # if "
        "it is one"
    )
