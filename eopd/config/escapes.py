r"""Text in which an escape ate a backslash: JSON and double quotes of YAML read ``\boxed`` as a
backspace and ``oxed``.

Control characters but tab and line ends are in no text that is meant. A tab or a carriage return
is, unless a known command of LaTeX follows whose first letter it was (``\theta``, ``\right``). What
begins with ``\n`` cannot be told from a line end.
"""

import re
from dataclasses import dataclass
from typing import Final

_NAMES: Final = {
    "\0": r"\0",
    "\a": r"\a",
    "\b": r"\b",
    "\t": r"\t",
    "\v": r"\v",
    "\f": r"\f",
    "\r": r"\r",
    "\x1b": r"\e",
    "\x85": r"\N",
    "\u2028": r"\L",
    "\u2029": r"\P",
}
# The short ones are words too (``an 8-bit number`` behind a tab): they count where a formula goes
# on.
_LATEX: Final = r"""
    \t (?: (?: heta | imes | ilde | herefore | hickapprox | riangle[a-z]* ) (?![A-Za-z])
         | ext [a-z]{0,6} \s? \{
         | (?: frac | binom ) [\d{]
         | (?: anh? | au | o ) (?: \s? (?!8|11|18) \d | \s? [\\^_{] )
         | anh? \( )
  | \r (?: ight [a-z]* | ho (?![A-Za-z]) )
"""
_SHORT: Final = r"\t (?: anh? | au | op? ) (?![A-Za-z])"
_CONTROLS: Final = re.compile(
    rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029] | {_LATEX}", re.VERBOSE
)
# A form feed ends a page of many documents, and is meant there.
_OF_JSON: Final = re.compile(
    rf"[\b] | \f (?: rac | orall | box | lat | rown ) | {_LATEX}", re.VERBOSE
)
_OF_A_FORMULA: Final = re.compile(rf"[\b\f] | {_SHORT} | {_LATEX}", re.VERBOSE)
_REST: Final = re.compile(r"[A-Za-z]{0,20}")


@dataclass(frozen=True, slots=True)
class Escape:
    r"""A character that an escape made: ``written`` is the escape (``\b``), ``meant`` what it
    began (``\boxed``).
    """

    written: str
    meant: str
    position: int

    def __str__(self) -> str:
        return f"holds the control character {self.written} (at position {self.position})"


def control_in(text: str) -> Escape | None:
    """Finds the first control character of a text in which none is meant, as in a config."""
    return _first(_CONTROLS, text)


def eaten_by_json(text: str, *, formula: bool = False) -> Escape | None:
    """Finds the first escape of a text of a data set; ``formula`` says that the text is short, and
    no prose behind tabs.
    """
    return _first(_OF_A_FORMULA if formula else _OF_JSON, text)


def _first(pattern: re.Pattern[str], text: str) -> Escape | None:
    match = pattern.search(text)
    if match is None:
        return None

    character, position = text[match.start()], match.start()
    letters = _REST.match(text, position + 1)
    escape = _NAMES.get(character, f"\\x{ord(character):02x}")
    return Escape(escape, escape + (letters.group() if letters else ""), position)
