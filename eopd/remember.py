"""A cache keeps what was computed from files until one of them changes.

An answer is found again by the contents of all that it came from: the question, the files, the code
of this package, and the versions of libraries. Left out: sharing between users, since the answers
are pickles, which must come from this user.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TypeVar

import eopd

T = TypeVar("T")

DIRECTORY = Path("~/.cache/eopd/remembered")
KEEP: Final = 16  # answers
LIBRARIES: Final = (
    "transformers",
    "tokenizers",
    "pydantic",
    "numpy",
    "torch",
    "vllm",
    "peft",
    "math-verify",
    "safetensors",
)
WEIGHTS: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
)


def remembered(question: str, files: Iterable[Path], compute: Callable[[], T]) -> T:
    """Returns ``compute()``, or what it returned when ``question`` and every file were the same.

    Files are the same by their contents, weights by name, size and time, since they would take
    minutes to read. Where the cache cannot be read or written, the answer is computed. Errors of
    ``compute`` are raised, and not kept.
    """
    try:
        directory = DIRECTORY.expanduser()
        kept = directory / _digest(question, files)
    except (OSError, RuntimeError):
        # A file cannot be read, and `compute` will raise that; or there is no home directory.
        return compute()

    with suppress(Exception):  # not there, or not readable by what is installed now: computed again
        answer: T = pickle.loads(kept.read_bytes())
        os.utime(kept)
        return answer

    answer = compute()

    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(pickle.dumps(answer))
        partial.replace(kept)
        for old in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-KEEP]:
            old.unlink(missing_ok=True)

    return answer


def _digest(question: str, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(question.encode())
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):  # on a machine that submits runs and starts none
            digest.update(f"\0{library} {version(library)}".encode())

    code = sorted(Path(eopd.__file__).parent.rglob("*.py"))

    for path in [*code, *sorted(files)]:
        digest.update(f"\0{path}\0".encode())
        if path.is_file():
            digest.update(_contents(path))

    return digest.hexdigest()


def _contents(path: Path) -> bytes:
    if path.suffix in WEIGHTS:
        entry = path.stat()
        return f"{entry.st_size} {entry.st_mtime_ns}".encode()

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
