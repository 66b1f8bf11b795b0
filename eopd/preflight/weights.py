"""The weights of a model directory are checked by the headers of their files.

A file that is missing, empty, cut short, or a Git LFS pointer is found here in milliseconds, and
not by an engine after minutes. Files of the ``.bin`` format have no header, so that only their
container is checked.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from eopd.config.json_text import JsonError, parse_json, told
from eopd.config.pointer import require_no_pointer

NO_WEIGHTS: Final = frozenset(
    {"training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin"}
)

# The files that transformers (5.19) looks for, in its order; vLLM (0.32.0) takes any name that ends
# so.
_STANDARD: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MISTRAL: Final = "consolidated"
_PICKLE: Final = b"\x80"  # how a .bin file of the oldest format begins


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a safetensors file: its file, its format (``F32``, ``BF16``), and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_tensors(directory: Path, *, standard_names: bool) -> Mapping[str, TensorInfo] | None:
    """Reads the tensors of a model directory, by name; None where they are ``.bin`` files.

    Args:
        directory: where the files are.
        standard_names: whether only the file names count that transformers looks for; vLLM takes
            others too.

    Raises:
        ValueError: there are no weights, or one of their files is missing, cut short, or no file of
            its format.
        OSError: a file cannot be read.
    """
    standard = [directory / name for name in _STANDARD if (directory / name).exists()]
    if standard and standard[0].name.endswith(".index.json"):
        return _read_shards(standard[0])

    if (index := directory / _STANDARD[1]) in standard:
        _read_shards(index)  # transformers passes over it, vLLM takes only the files that it names

    files = standard[:1]
    if files and index not in standard:
        _require_no_other(directory, files[0])

    if not files and not standard_names:
        files = _other_files(directory)

    if not files:
        raise ValueError(f"{directory} has no weights: {_what_is_there(directory, standard_names)}")

    return _read_files(files)


def _require_no_other(directory: Path, file: Path) -> None:
    """Refuses weights beside the only standard file: vLLM loads them too (0.32.0, where no index
    names its files), and of two tensors of one name the last. Not Mistral's own files, which it
    would load alone.
    """
    others = [other.name for other in _other_files(directory) if other != file]
    if others and not any(name.startswith(_MISTRAL) for name in others):
        raise ValueError(
            f"{directory} holds {', '.join(others[:3])} beside {file.name}; vLLM would load "
            "all of them as one model: move away what does not belong to it"
        )


def has_weights(directory: Path) -> bool:
    """Tells whether a model directory holds weights, or an index of them, whole or not."""
    return any((directory / name).exists() for name in _STANDARD) or bool(_other_files(directory))


def are_equal(tensors: Mapping[str, TensorInfo], a: str, b: str) -> bool:
    """Tells whether two tensors are the same bytes. Their files are mapped, so that this takes no
    memory of their size.
    """
    if (tensors[a].dtype, tensors[a].shape) != (tensors[b].dtype, tensors[b].shape):
        return False

    import torch

    with (
        safe_open(tensors[a].file, framework="pt") as file_a,
        safe_open(tensors[b].file, framework="pt") as file_b,
    ):
        bytes_of_a = file_a.get_tensor(a).flatten().view(torch.uint8)
        return torch.equal(bytes_of_a, file_b.get_tensor(b).flatten().view(torch.uint8))


def _other_files(directory: Path) -> list[Path]:
    """Returns the weights of other names that vLLM takes: all safetensors files, or else all others
    that may be weights.
    """
    safe = sorted(directory.glob("*.safetensors"))
    return safe or sorted(file for file in directory.glob("*.bin") if file.name not in NO_WEIGHTS)


def _what_is_there(directory: Path, standard_names: bool) -> str:
    expected = ", ".join(_STANDARD) if standard_names else "*.safetensors, *.bin"
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
    other = sorted(file.name for file in directory.iterdir() if file.suffix in suffixes)
    return f"it has none of {expected}" + (f", but {', '.join(other[:3])}" if other else "")


def _read_shards(index: Path) -> Mapping[str, TensorInfo] | None:
    """Reads the tensors of all shards, each of which must be in the shard that the index names."""
    _require_whole(index)
    try:
        tree = parse_json(index.read_bytes())
    except JsonError as error:
        raise ValueError(f"{index} {error}; copy or download it again") from None

    shard_of = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map")

    for tensor, name in shard_of.items():
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{index}: weight_map: {tensor}: must be the name of a file, is {told(name)}"
            )

    names = sorted(set(shard_of.values()))
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files of its weights, "
            f"the first is {missing[0]}; {index.name} names it"
        )

    tensors = _read_files([index.parent / name for name in names])
    if tensors is None:
        return None

    for tensor, name in shard_of.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise ValueError(
                f"{index.parent / name} holds no tensor {tensor}, which {index.name} says it does"
            )

    return tensors


def _read_files(files: Sequence[Path]) -> Mapping[str, TensorInfo] | None:
    for file in files:
        _require_whole(file)

    if any(file.suffix != ".safetensors" for file in files):
        for file in files:
            _require_container(file)

        return None

    tensors = {name: info for file in files for name, info in _read_header(file)}
    if not tensors:
        raise ValueError(f"{files[0]} holds no tensors; copy or download it again")

    return tensors


def _require_whole(file: Path) -> None:
    """Refuses a directory, an empty file, and a Git LFS pointer, with a ValueError."""
    if file.is_dir():
        raise ValueError(f"{file} is a directory; it must be a file")

    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")

    require_no_pointer(file)


def _require_container(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(1)

    if start != _PICKLE and not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is cut short, or no file that torch wrote; copy or download it again"
        )


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the tensors of a safetensors file, which holds all their bytes and no other."""
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.offset_keys():
                tensor = opened.get_slice(name)
                yield name, TensorInfo(file, tensor.get_dtype(), tuple(tensor.get_shape()))
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short, or no safetensors file ({error}); copy or download it again"
        ) from None
