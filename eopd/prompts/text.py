"""Text that can be tokenised and was meant."""

import re
from typing import Final

from eopd.config.escapes import eaten_by_json

_NO_TEXT: Final = re.compile("[\ud800-\udfff\0]")


def fault_of(text: str) -> str | None:
    r"""What keeps ``text`` from being tokenised, or None.

    JSON can write half of a character that UTF-16 needs two units for (``"\ud83d"``); no tokenizer
    takes it.
    """
    found = _NO_TEXT.search(text)
    if found is None:
        return None

    if found.group() == "\0":
        return (
            f"holds the NUL character (\\u0000 at position {found.start()}), which is no "
            "text; take it out"
        )

    return (
        f"holds half a character (\\u{ord(found.group()):04x} at position {found.start()}), "
        "which is no text; write the whole character, or \\ufffd in its place"
    )


def fault_of_field(text: str, *, formula: bool = False) -> str | None:
    r"""What keeps a text of a row from being what was meant, or None.

    JSON reads ``"\frac"`` as a form feed and ``rac``: who wrote it has a wrong prompt or answer,
    without a word. ``formula`` says that it is short, and no prose behind tabs.
    """
    if fault := fault_of(text):
        return fault

    found = eaten_by_json(text, formula=formula)
    if found is None:
        return None

    return f"{found}, which JSON makes of {found.meant}; double the backslash: \\{found.meant}"
