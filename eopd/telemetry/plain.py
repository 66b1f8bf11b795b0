"""Texts of people, models and programs are shown as they are: rich reads no brackets in them as markup
and no ``:100:`` as an emoji, and no control character reaches a terminal.
"""

import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import rich.console

SLOW_S: Final = 20.0
_LINE_ENDS: Final = re.compile("[\u2028\u2029]")


def terminal(*, width: int | None = None, stderr: bool = False) -> rich.console.Console:
    """Returns the terminal, for tables and lines of plain text."""
    return rich.console.Console(
        width=width, stderr=stderr, emoji=False, markup=False, highlight=False
    )


def say(output: rich.console.Console, text: str, *, style: str | None = None) -> None:
    """Prints a text, whose lines are as long as they are."""
    plain = visible(text)
    output.print(plain, style=style, emoji=False, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def told_while_slow(what: str) -> Iterator[None]:
    """Says on the terminal every ``SLOW_S`` what is still being done, while the block runs."""
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SLOW_S):
            say(terminal(stderr=True), f"still {what}, for {time.monotonic() - started:.0f} s")

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    finally:
        done.set()
        telling.join()


def visible(text: str) -> str:
    """Returns a text as a person can see it, without control characters and those that turn the line
    around. Spaces of every width stay, and Unicode's own ends of lines and paragraphs are marked.
    """
    text = _LINE_ENDS.sub("\u21b5", text)
    return "".join(c if c.isprintable() or c in "\n\t" or is_space(c) else "\ufffd" for c in text)


def is_space(character: str) -> bool:
    """Tells whether a character is a space, and ends no line."""
    return unicodedata.category(character) == "Zs"
