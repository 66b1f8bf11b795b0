"""Git LFS pointers: small texts that Git leaves where a large file belongs, until it is fetched."""

from pathlib import Path
from typing import Final

POINTER: Final = b"version https://git-lfs.github.com/spec/"


def require_no_pointer(file: Path) -> None:
    """Refuse a file that Git left where a larger one belongs.

    Raises:
        ValueError: it is a Git LFS pointer.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
            )
