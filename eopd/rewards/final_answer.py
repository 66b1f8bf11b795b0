r"""The final answer of a text is found, and brought into one spelling.

A response boxes its answer (``\boxed{}``, ``\fbox{}``, ``\boxed 5``), or ends with a line ``####
72`` as GSM8K's solutions do; so does a reference. Prose is not searched for numbers.
"""

import re
import unicodedata
from typing import Final

from eopd.rewards.spelling import TEXT, with_plain_numbers

_TOKENS: Final = re.compile(
    r"""
      (?P<box> \\ (?: boxed | fbox ) \s* \{ )
    | \\ (?: boxed | fbox ) (?![A-Za-z]) \s* (?P<bare>
          (?= [-+\u2212.\d\\] ) (?: \\[A-Za-z]+ | \{ (?: [^{}] | \{[^{}]*\} )* \} | [^\s{}$\\] )+  # \boxed\pi
        | [A-Za-z] (?= \s* (?: [$.,;)] | \\\) | $ ) )  # \boxed A$
      )
    | \\ .
    | [{}]
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_MARK: Final = re.compile(r"\s*####(?!#)\s*(.*)")
_PAIRS: Final = (
    ("**", "**"),
    ("*", "*"),
    ("`", "`"),
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
)
_SPELT: Final = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),  # spaces without width
}
_WORD: Final = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
MOST_WORDS: Final = 5
_FRACTION: Final = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_SUPERSCRIPT: Final = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207f\u2071]+")


def final_answer(text: str) -> str | None:
    r"""Returns the content of the last box, or else of a last line that begins with ``####``; None
    where there is neither.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed

    marked = _MARK.fullmatch(last_line(text))
    return marked[1] if marked else None


def last_line(text: str) -> str:
    """Returns the last line that is not empty, or an empty text."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the complete box that begins last, or None. Braces nest, ``\{`` and
    ``\}`` are text.

    A box is ``\boxed{...}``, ``\fbox{...}``, or one of these before a number, a command or a single
    letter: ``\boxed 5``, ``$\boxed5$``.
    """
    last: tuple[int, int] | None = None
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its content begins)

    for token in _TOKENS.finditer(text):
        if token["bare"] is not None:
            last = token.span("bare")
        elif token["box"] or token.group() == "{":
            open_braces.append((token["box"] is not None, token.end()))
        elif token.group() == "}" and open_braces:
            is_box, begin = open_braces.pop()
            if is_box and (last is None or begin > last[0]):
                last = (begin, token.start())

    return None if last is None else text[slice(*last)]


def as_text(answer: str) -> str:
    """Returns an answer in the spelling in which ``exact.grade_exact`` compares it.

    Superscripts, fractions and circled digits stay what they are: ``10\u00b2`` is not ``102``.
    """
    text = _unwrapped(" ".join(_spelt(answer).casefold().split()))
    return _unwrapped(text.strip("$ "))  # also a sign of maths, or of money, on one side


def as_latex(answer: str) -> str:
    r"""Returns an answer as LaTeX reads it: ``10\u00b2`` is ``10^{2}``, a one-character half
    ``\\frac{1}{2}``, and numbers are as ``with_plain_numbers`` writes them.
    """
    text = _FRACTION.sub(_fraction, _unwrapped(_spelt(answer).strip()))
    text = _SUPERSCRIPT.sub(
        lambda run: f"^{{{_spelt(unicodedata.normalize('NFKC', run[0]))}}}", text
    )
    return with_plain_numbers(text)


def is_prose(answer: str) -> bool:
    """Tells whether an answer is a sentence, and no expression or name: it has more than five words
    outside of LaTeX text.
    """
    return len(_WORD.findall(TEXT.sub("", answer))) > MOST_WORDS


def _fraction(character: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", character[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _spelt(text: str) -> str:
    """Returns a text with the digits of every script as 0 to 9, full-width characters as narrow ones,
    and one sign for minus.
    """
    return "".join(_plain(character) for character in unicodedata.normalize("NFC", text))


def _plain(character: str) -> str:
    if character.isascii():
        return character

    if character in _SPELT:
        return _SPELT[character]

    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)

    kind, _, code = unicodedata.decomposition(character).partition(" ")

    return chr(int(code, 16)) if kind in ("<wide>", "<narrow>") else character


def _unwrapped(text: str) -> str:
    """Returns a text without enclosing emphasis and signs of maths, and without closing full stops."""
    while True:
        shorter = text.strip().rstrip(". ")
        if shorter.endswith(r"\right"):  # the full stop is its delimiter
            shorter += "."

        for begin, end in _PAIRS:
            inner = shorter[len(begin) : len(shorter) - len(end)]
            if (
                shorter == f"{begin}{inner}{end}"
                and inner
                and begin not in inner
                and end not in inner
            ):
                shorter = inner

        if enclosed := TEXT.fullmatch(shorter):
            shorter = enclosed[1]

        if shorter == text:
            return text

        text = shorter
