"""Leaves out of a run what says who ran it, and where, so that its report can be given away:
absolute paths, addresses and names of hosts, names of users.

In settings every path keeps its last part, and every address its scheme. Texts of prompts and
answers stay, apart from the names that the settings and this machine gave away.
"""

import getpass
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

LEFT_OUT: Final = "…"
_ANYBODY: Final = {"root", "localhost", "auto", "local", "127.0.0.1", "0.0.0.0", "::1", ""}
_HOST_KEYS: Final = {"address", "host", "entity", "user", "hostname"}
_NODE_LABELS: Final = "node_labels"

_WORD = re.compile(r"[a-z_][a-z0-9_]*")
_HOME = re.compile(r"/(?:home|Users)/([^/\s]+)")
_ADDRESS = re.compile(
    r"\b([a-z][a-z0-9+.-]*)://(?:([^/@\s:]+)[^/@\s]*@)?([^/:\s]*)\S*", re.IGNORECASE
)
_MAIL = re.compile(r"(?<![\w./-])([\w.+-]+)@([\w-]+\.[\w.-]+)")
_IP = re.compile(r"\b(?!127\.|0\.0\.0\.0)\d{1,3}(?:\.\d{1,3}){3}\b")
_PATH = re.compile(r"(?<![\w/.:<…-])~?[\w.-]*/(?:[^\s/'\":,;]+/)*[^\s/'\":,;]*")


class Public:
    """Leaves names out of the files of one run; ``settings`` are where it learns them."""

    def __init__(self, settings: object) -> None:
        names = {*_own_names(), *_names("", settings)} - _ANYBODY
        ordered = sorted(names, key=len, reverse=True)
        words = [rf"(?<!\w){re.escape(name)}(?!\w)" for name in ordered]
        self._names = re.compile("|".join(words) or "(?!)")  # without a name, nothing is one

    def settings(self, value: Any) -> Any:  # noqa: ANN401  what JSON holds
        """Returns a tree of settings, whose keys are whole, without paths, addresses and names."""
        return _with_texts(value, self._setting)

    def texts(self, value: Any) -> Any:  # noqa: ANN401  what JSON holds
        """Returns a tree of other texts without the names."""
        return _with_texts(value, lambda text, _: self.text(text))

    def text(self, text: str) -> str:
        """Returns a text without the names."""
        return self._names.sub(LEFT_OUT, text)

    def _setting(self, text: str, key: str) -> str:
        if _NODE_LABELS in key.split("."):
            return LEFT_OUT

        text = _IP.sub(LEFT_OUT, _ADDRESS.sub(rf"\1://{LEFT_OUT}", text))
        is_path = text.startswith(("/", "~")) and "\n" not in text
        return self.text(_last_part(text) if is_path else _PATH.sub(_shortened, text))


def _with_texts(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:  # noqa: ANN401
    """Returns a tree with every text changed, by itself and the key of its place; so are names that
    are no words, as of a label or an option.
    """
    if isinstance(value, Mapping):
        return {
            name if _WORD.fullmatch(str(name)) else change(str(name), ""): _with_texts(
                inner, change, f"{key}.{name}"
            )
            for name, inner in value.items()
        }

    if isinstance(value, list):
        return [_with_texts(inner, change, key) for inner in value]

    return change(value, key) if isinstance(value, str) else value


def _shortened(match: re.Match[str]) -> str:
    path = match.group()
    return _last_part(path) if path.startswith(("/", "~")) and len(path) > 1 else path


def _last_part(path: str) -> str:
    return f"{LEFT_OUT}/{PurePosixPath(path).name}"


def _names(key: str, value: object) -> Iterator[str]:
    """Yields the users and hosts that settings name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _names(str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(key, inner)
    elif isinstance(value, str):
        yield from _HOME.findall(value)
        for _, user, host in _ADDRESS.findall(value):
            yield from (user, host)

        for pair in _MAIL.findall(value):
            yield from pair

        if re.split("[./]", key)[-1] in _HOST_KEYS:  # a label's, as in kubernetes.io/hostname
            yield from (value, value.rpartition(":")[0])


def _own_names() -> Iterator[str]:
    """Yields the names of this user and this host."""
    yield socket.gethostname()
    yield Path.home().name
    with suppress(KeyError, OSError, ImportError):  # no entry in the password file
        yield getpass.getuser()
