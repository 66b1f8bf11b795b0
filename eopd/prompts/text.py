"""Text of a row is checked: whether it can be tokenised, and whether it was meant as it stands."""

import re
from typing import Final

from eopd.config.escapes import eaten_by_json

_NO_TEXT: Final = re.compile("[\ud800-\udfff\0]")


def fault_of(text: str) -> str | None:
    r"""Returns what keeps ``text`` from being tokenised, or None.

    JSON can write half of a character that UTF-16 needs two units for (``"\ud83d"``); no tokenizer
    takes it.
    """
    match = _NO_TEXT.search(text)
    if match is None:
        return None

    if match.group() == "\0":
        return (
            f"holds the NUL character (\\u0000 at position {match.start()}), which is no "
            "text; take it out"
        )

    return (
        f"holds half a character (\\u{ord(match.group()):04x} at position {match.start()}), "
        "which is no text; write the whole character, or \\ufffd in its place"
    )


def fault_of_field(text: str, *, formula: bool = False) -> str | None:
    r"""Returns why a text of a row cannot be what was meant, or None.

    JSON reads ``"\frac"`` as a form feed and ``rac``, which silently makes a wrong prompt or answer.
    ``formula`` says that the text is short, and no prose behind tabs.
    """
    if fault := fault_of(text):
        return fault

    escape = eaten_by_json(text, formula=formula)
    if escape is None:
        return None

    return f"{escape}, which JSON makes of {escape.meant}; double the backslash: \\{escape.meant}"
