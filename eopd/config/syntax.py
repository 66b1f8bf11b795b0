"""What YAML's parser stumbled over, in the line where it was written and in words of somebody who
wrote it.

The parser names the place where it could not go on, which is often the line after the mistake, or
the last one.
"""

import re
from typing import Final

import yaml

_NO_SPACE: Final = re.compile(r"\s*(- +)*[^\s:#'\"]+:[^\s:/]")  # key:value, which is text in YAML
_UNQUOTABLE: Final = re.compile(r"found character '(.+)' that cannot start any token")
_OPENED: Final = {"while parsing a flow sequence": "[", "while parsing a flow mapping": "{"}


def explain_syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """Writes where and why a text is no YAML, as in ``line 8: no space after the colon``."""
    at = _line(error.problem_mark) or _line(error.context_mark) or 1
    start = _line(error.context_mark) or at
    for line, words in (_never_ended(error, start, text), _out_of_place(error, at, text)):
        if words:
            return f"line {line}: {words}"

    return f"line {at}: {', '.join(part for part in (error.context, error.problem) if part)}"


def _never_ended(error: yaml.MarkedYAMLError, start: int, text: str) -> tuple[int, str | None]:
    """Returns what was begun in a line and not ended there."""
    problem = error.problem or ""
    match error.context:
        case "while scanning a simple key":
            return start, "no space after the colon" if ":" in _text(
                text, start
            ) else "no colon after the key"
        case "while scanning a quoted scalar" if "end of stream" in problem:
            return start, "a quote is never closed"
        case "while parsing a flow node" if "stream end" in problem:
            return start, "a [ or { is never closed"
        case "while parsing a flow sequence" | "while parsing a flow mapping" if (
            "expected ','" in problem
        ):
            return start, f"a {_OPENED[error.context]} is never closed, or a comma is missing in it"
        case _:
            return start, None


def _out_of_place(error: yaml.MarkedYAMLError, at: int, text: str) -> tuple[int, str | None]:
    """Returns what the parser met where it cannot stand."""
    problem, line = error.problem or "", _text(text, at)
    if "mapping values are not allowed" in problem:
        previous = next(
            (number for number in range(at - 1, 0, -1) if _text(text, number).strip()), at
        )
        if previous < at and _NO_SPACE.match(_text(text, previous)):
            return previous, "no space after the colon"

        if line.count(": ") > 1:
            return at, "a second colon: quote a text that holds a colon and a space"

        return at, "indented differently from the keys around it"

    if "found '<scalar>'" in problem:
        return at, "text after a closed quote: quote all of it, and write a quote within as two"

    if "found '<block mapping start>'" in problem or (
        "found '?'" in problem and "block collection" in (error.context or "")
    ):
        return at, "indented differently from the lines around it"

    if match := _UNQUOTABLE.search(problem):
        tab = match[1] == "\\t"
        return (
            at,
            "a tab: indent with spaces" if tab else f"quote a text that begins with {match[1]}",
        )

    return at, None


def _text(text: str, line: int) -> str:
    return (text.splitlines() or [""])[min(line, len(text.splitlines())) - 1]


def _line(mark: yaml.Mark | None) -> int | None:
    return None if mark is None else int(mark.line) + 1
