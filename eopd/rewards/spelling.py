r"""Numbers and words as people write them are respelt for a reader that takes what stands side by side
as a product.

math-verify (0.9) reads ``1 000`` as 1 times 0, ``1e-3`` as e - 3, and ``listen`` as the letters of
``silent``.
"""

import re
from typing import Final

_THIN: Final = "\u00a0\u2007\u2009\u200a\u202f"
_THOUSANDS: Final = r"(?<![\w.,\\^]) [1-9]\d{0,2} (?: (?:SEPARATOR) \d{3} )+ (?!\d)"
_OF_LATEX: Final = rf",?\\[,;:!\ ] | \{{,\}} | ~ | [{_THIN}]"
_GROUPED: Final = re.compile(_THOUSANDS.replace("SEPARATOR", _OF_LATEX), re.VERBOSE)
_GROUPED_BY_SPACES: Final = re.compile(_THOUSANDS.replace("SEPARATOR", r"\ "), re.VERBOSE)
_NO_DIGIT: Final = re.compile(r"\D")
_MIXED: Final = re.compile(r"([-+]?\s*\d+)\s+(\d+)\s*/\s*(\d+)")
_SCIENTIFIC: Final = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([-+]?\d{1,3})")
_DEGREES: Final = re.compile(
    r"(?<!\s)\s*(?: \u00b0 | \^\s*\\circ(?![a-z]) | \^\s*\{\s*\\circ\s*\} | \\degree(?![a-z]) )"
    r"(?: \s* (?: [CF](?![A-Za-z]) | \\(?:text|mathrm)\{\s*[CF]\s*\} ) )?"
    r" | (?<=\d) \s* (?: degrees?\b | \\text\{\s*degrees?\s*\} )",
    re.VERBOSE,
)
_OF_ANGLES: Final = re.compile(r"sin|cos|tan|cot|sec|csc")
_SIDE_BY_SIDE: Final = re.compile(rf"(?<![\d_^.]) [\d.]*\d [\s{_THIN}]+ \.?\d", re.VERBOSE)
_TWO_ARGUMENTS: Final = re.compile(r"\\[a-z]?(?:frac|binom)\s*\d\s*\d")
TEXT: Final = re.compile(r"\\(?:text|textbf|textit|emph|mathbf|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS: Final = re.compile(r"[^\W\d_]+(?:[\s\-'.,]+[^\W\d_]+)*")
_A_WORD: Final = re.compile(r"(?<![^\W\d_])(?:[^\W\d_]{4,}|[A-Z][a-z]{2,})(?![^\W\d_])")


def with_plain_numbers(text: str) -> str:
    r"""Returns a text with plain numbers: ``1000`` for ``1 000`` and ``1\,000``, ``1 \cdot 10^{-3}``
    for ``1e-3``, ``3\frac{1}{2}`` for ``3 1/2``. An angle or a temperature in degrees becomes its
    number, but not under a sine.
    """
    text = _GROUPED.sub(_digits, text)
    alone = _GROUPED_BY_SPACES.search(text)
    if alone and not re.search(
        r"\d", re.sub(r"^[.,]\d+", "", text[alone.end() :]) + text[: alone.start()]
    ):
        text = _GROUPED_BY_SPACES.sub(_digits, text)

    if not _OF_ANGLES.search(text):
        text = _DEGREES.sub(" ", text).strip()

    if match := _SCIENTIFIC.fullmatch(text):
        return rf"{match[1]} \cdot 10^{{{int(match[2])}}}"

    if (match := _MIXED.fullmatch(text)) and int(match[2]) < int(match[3]):
        return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"

    return text


def stand_side_by_side(text: str) -> bool:
    r"""Tells whether two numbers have only a space between them: ``12 34`` may be one number, two, or
    a product. The numbers of ``\frac 1 2`` and ``\log_2 8`` do not count.
    """
    return _SIDE_BY_SIDE.search(_TWO_ARGUMENTS.sub("", TEXT.sub("", text))) is not None


def are_words_of_the_same_letters(one: str, other: str) -> bool:
    """Tells whether two answers are different words of the same letters: no product of letters is
    meant then.

    Words have four letters or begin with a capital: ``abc`` and ``cab`` are products.
    """
    words = [TEXT.sub(r"\1", text).strip(" .$") for text in (one, other)]
    if not all(_WORDS.fullmatch(text) for text in words) or not any(
        _A_WORD.search(text) for text in words
    ):
        return False

    spelt = [re.findall(r"[^\W\d_]", text.casefold()) for text in words]
    return spelt[0] != spelt[1] and sorted(spelt[0]) == sorted(spelt[1])


def _digits(number: re.Match[str]) -> str:
    return _NO_DIGIT.sub("", number[0])
