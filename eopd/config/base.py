"""The base of every config section, and the values that several sections share with their
bounds.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Final, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from eopd.config.escapes import control_in
from eopd.config.names import ModelName

NativeOptions = dict[str, object]
Names = tuple[str, ...]  # of which one may stand without a list

OWN_GRADERS: Final = ("exact", "math")
DATA_SUFFIXES = (".jsonl", ".parquet")

# Bounds are far beyond what anybody runs: what lies outside was written by mistake.
MAX_COUNT: Final = 1_000_000_000
MAX_TOKENS: Final = 10_000_000
MAX_ACTORS: Final = 4096
MAX_GPUS_OF_AN_ACTOR: Final = 64
MAX_NAME_BYTES: Final = 255  # of what Linux and its file systems take
MAX_PATH_BYTES: Final = 4095

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Actors = Annotated[int, Field(ge=1, le=MAX_ACTORS)]
Threads = Annotated[int, Field(ge=1, le=512)]
Cpus = Annotated[float, Field(ge=0.0, le=1024.0)]
# to three years: a time-out that is never reached
Seconds = Annotated[float, Field(ge=0.001, le=1e8)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]  # what ``torch.manual_seed`` takes
# vLLM samples at 0.01 when asked for less; then the learner's probabilities are not the engine's.
Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
SamplingTemperature = Annotated[float, Field(ge=0.01, le=2.0)]  # above 2 vLLM refuses a request


def _whole_or_share(gpus: float) -> float:
    if gpus > 1.0 and not gpus.is_integer():
        raise ValueError(f"{gpus:g} is neither a whole number of GPUs nor, below 1, a share of one")

    return gpus


Gpus = Annotated[
    float, Field(ge=0.0, le=float(MAX_GPUS_OF_AN_ACTOR)), AfterValidator(_whole_or_share)
]


_LABEL: Final = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


def _are_labels(labels: dict[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        if not (re.fullmatch(rf"({_LABEL}/)?{_LABEL}", name) and re.fullmatch(_LABEL, value)):
            raise ValueError(
                f"{name}: {value} is no label: a name and a value have up to 63 letters, digits, -, "
                "_ and ., with a letter or digit at both ends, and a name may have one / within"
            )

    return labels


NodeLabels = Annotated[
    dict[str, str],
    AfterValidator(_are_labels),
    Field(description="a mapping from the names of labels to their values"),
]


def _resolve(path: Path) -> Path:
    """Make a path absolute, since actors may run in another working directory. ``~`` is the home
    directory.
    """
    text = str(path)
    if "\0" in text:
        raise ValueError("a path holds no NUL character")

    if text.startswith("$"):
        raise ValueError(
            f"{text}: variables are not filled in; write the path out, or begin it with ~"
        )

    scheme, is_address, rest = text.partition(":/")  # of the two strokes a path has kept one
    if is_address and "/" not in scheme:
        raise ValueError(
            f"{scheme}://{rest} is an address; it must be a path on a disk that every node reads"
        )

    try:
        absolute = path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user, or no home directory") from None

    try:
        str(absolute).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(absolute).decode(errors="replace")
        raise ValueError(f"the path {shown} is not UTF-8; give its folder another name") from None

    if (longest := max(len(os.fsencode(part)) for part in absolute.parts)) > MAX_NAME_BYTES:
        raise ValueError(f"a name in a path has {MAX_NAME_BYTES} bytes at most (has {longest})")

    if (length := len(os.fsencode(absolute))) > MAX_PATH_BYTES:
        raise ValueError(f"a path has {MAX_PATH_BYTES} bytes at most (has {length})")

    return absolute


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must be a path (is ''); . is the working directory")

    return value


AbsolutePath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_resolve)]


def _as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, Path) else value


def _resolve_model(spec: str) -> str:
    """Make a path absolute, unless it is the name of a model and nothing lies there."""
    is_name = ModelName.parse(spec) is not None and not os.path.lexists(spec)
    return spec if is_name else str(_resolve(Path(spec)))


# An absolute path or the name of a model on the Hub; ``eopd.hub.model_directory`` finds either.
ModelSpec = Annotated[
    str,
    Field(description="a directory, or OWNER/NAME on the Hugging Face Hub"),
    BeforeValidator(_not_empty),
    BeforeValidator(_as_text),
    AfterValidator(_resolve_model),
]


def resolve_data(spec: str) -> str:
    """Make the path of a file absolute; anything else is the name of a data set."""
    if not spec.strip():
        raise ValueError("must be a .jsonl or .parquet file, or a data set's name (is '')")

    if "\0" in spec:
        raise ValueError("a path holds no NUL character")

    is_path = "://" in spec or Path(spec).suffix in DATA_SUFFIXES
    return str(_resolve(Path(spec))) if is_path else spec


DataSpec = Annotated[str, AfterValidator(resolve_data)]


def _without_controls(text: str) -> str:
    if escape := control_in(text):
        raise ValueError(
            f"{escape}, which double quotes in YAML make of {escape.meant}; double the "
            f"backslash (\\{escape.meant}), or write the text in single quotes"
        )

    return text


# What is put into prompts: a control character in it was a backslash once.
PromptText = Annotated[str, AfterValidator(_without_controls)]


def split_function(function: str) -> tuple[str, str]:
    """Split ``package.module:name``; neither part is looked up.

    Raises:
        ValueError: it is written in another way.
    """
    module, _, name = function.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"must be package.module:name, such as my_rewards:score (is {function!r})")

    return module, name


def _function(function: str) -> str:
    split_function(function)
    return function


def require_grader(function: str) -> str:
    """Return the name of a grader, which is one of ours or a function's.

    Raises:
        ValueError: it is neither.
    """
    if function in OWN_GRADERS:
        return function

    try:
        return _function(function)
    except ValueError as error:
        close = difflib.get_close_matches(function, OWN_GRADERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{error}, or one of {', '.join(OWN_GRADERS)}{hint}") from None


# The import path of a user's function (``eopd/plugins.py``), which preflight looks up.
_FUNCTION: Final = "the import path of a function"  # marks the fields that hold one
FunctionName = Annotated[str, AfterValidator(_function), _FUNCTION]
GraderName = Annotated[str, AfterValidator(require_grader), _FUNCTION]


def _names_a_function(field: FieldInfo) -> bool:
    """Whether a field has the type of a function's import path, or of that or null."""
    members = [getattr(part, "__metadata__", ()) for part in get_args(field.annotation)]
    return any(_FUNCTION in metadata for metadata in (field.metadata, *members))


def functions_of(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every function of the user that a section names, with its key.

    A field names one by its type: ``FunctionName``, or ``GraderName`` where it is none of ours.
    """
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            inner, inner_key = getattr(value, name), f"{key}.{name}".lstrip(".")
            if isinstance(inner, str) and _names_a_function(field) and inner not in OWN_GRADERS:
                yield inner_key, inner
            else:
                yield from functions_of(inner, inner_key)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from functions_of(inner, f"{key}.{number}")


def refuse(key: str, options: Mapping[str, object], owned: Mapping[str, str]) -> None:
    """Refuse native options that this project must set itself; ``owned`` says what decides each.

    Raises:
        ValueError: names them.
    """
    if names := [name for name in options if name in owned]:
        raise ValueError(
            "; ".join(f"{key}.{name}: cannot be set here: {owned[name]}" for name in names)
        )


_MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes")


def require_gpus_for_workers(gpus: float, vllm: Mapping[str, object]) -> None:
    """Compare the GPUs of one engine with the workers that its ``vllm`` options start, one GPU
    each. An engine that has a share of a GPU must say how much of its memory it takes.

    Raises:
        ValueError: they differ, the workers are more than a node has, or the memory is not said.
    """
    names = ("tensor_parallel_size", "pipeline_parallel_size")
    sizes = {name: size for name in names if type(size := vllm.get(name, 1)) is int}
    workers = 1

    for name, size in sizes.items():
        workers *= size
        if size < 1 or workers > MAX_GPUS_OF_AN_ACTOR:
            raise ValueError(f"vllm.{name}: must be from 1 to {MAX_GPUS_OF_AN_ACTOR} (is {size})")

    if 0.0 < gpus < 1.0 and workers == 1 and not any(name in vllm for name in _MEMORY):
        raise ValueError(
            f"gpus: {gpus:g} is a share, and the engine would take 92 % of the GPU's memory; add "
            f"vllm: {{gpu_memory_utilization: {0.9 * gpus:.2g}}}, or kv_cache_memory_bytes"
        )

    if gpus == 0.0 or (workers == 1 and gpus <= 1.0) or gpus == workers:
        return

    product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if product:
        raise ValueError(f"gpus: must be {workers} for vllm.{product} (is {gpus:g})")

    raise ValueError(
        f"gpus: the engine would use one of {gpus:g}; add vllm: {{tensor_parallel_size: {gpus:g}}}"
    )


class Section(BaseModel):
    """The base of every config section: frozen; an unknown key is an error, never ignored;
    defaults are checked like values.

    What stands beneath a field is its description. The ``description`` of pydantic's ``Field`` is
    what a message says may stand there, where bounds do not say it.

    ``short`` is the key that a bare text in the place of the section stands for.
    """

    short: ClassVar[str | None] = None

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )
