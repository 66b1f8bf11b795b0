"""Functions of the user take part in a run by their import path: ``package.module:name``.

There are five kinds. Each is a Protocol below, with the signature that the function must have and
an example. Keys under ``options`` of the config become keyword arguments of the function.

    kind               key of the config                      runs in
    RewardFunction     loss.reverse_kl.reward.function        a child of every rollout actor
    GateFunction       loss.gate.function                     every learner rank
    FilterFunction     flow.filter.function                   a child of every teacher actor
    DataFunction       prompts.data.function                  the driver, before the run
    GraderFunction     a benchmark's grader, eval --grader    a child of the driver

A module is looked for where Python looks for any module, and then in the working directory. Ray
lets its workers look first in the working directory of the driver, and in a job in that of the job
(2.60).

This module loads nothing but the standard library, numpy and the config.
"""

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import pickle
import sys
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

import numpy as np

from eopd.config import ConfigError
from eopd.config.base import split_function
from eopd.types import BoolArray, Float32Array, Int32Array, Reference

if TYPE_CHECKING:
    from torch import Tensor

# where code lies that is not the user's: of Python, of installed packages, of this one
_NOT_THE_USERS: Final = (
    "<frozen",
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")),
    f"{Path(__file__).parent}{os.sep}",
)

# What a row of the data holds: its own columns as they stand there, and always ``id``, ``source``,
# ``prompt`` (the user's last text, with ``prompts.suffix``), ``messages`` (role and content of each)
# and ``answer`` (the accepted answer as text, a tuple of several, or None).
Row = Mapping[str, Any]


class RewardFunction(Protocol):
    """A reward function says how good a response is. It may be a coroutine function.

    Example, the share of the asked-for words that a response has::

        def score(row, response, response_ids, *, floor=0.0):
            wanted = row["keywords"]
            found = sum(word in response for word in wanted)
            return max(floor, found / len(wanted))
    """

    def __call__(
        self, row: Row, response: str, response_ids: Sequence[int], /
    ) -> float | Awaitable[float]:
        """Returns the reward of one response, a number from -1e9 to 1e9.

        Args:
            row: the row of the data that was asked, with ``answer`` and its own columns.
            response: the text of the response, without special tokens.
            response_ids: [R], its token ids, the end token included.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GateTokens:
    """The tokens of one response, as a gate sees them. Entropies and log-probabilities are float32
    and in nats; K is ``loss.top_k``.

    Gates are computed before the student reads the batch, so that its log-probabilities are those
    of the weights that sampled.
    """

    teacher_entropy: "Tensor"  # [R], of its full softmax, or what `entropy_bound` reads of bounds
    teacher_logprobs: "Tensor"  # [R], of the tokens that were sampled
    teacher_topk_logprobs: "Tensor"  # [R, K], of its candidates, most likely first
    teacher_tail_logprobs: "Tensor"  # [R], of all other tokens together
    rollout_logprobs: "Tensor"  # [R], of the student that sampled, at `rollout.temperature`
    loss_mask: "Tensor"  # [R], bool: whether a token enters the loss


class GateFunction(Protocol):
    """A gate function says how much forward KL each token of a response gets. It is pure: it sees
    one response at a time, and the same tokens give the same gate.

    Example, a gate that opens where the teacher is unsure and the student took an unlikely token::

        def unsure_and_surprised(tokens, *, tau=0.8, nats=2.0):
            unsure = tokens.teacher_entropy > tau
            return (unsure & (tokens.rollout_logprobs < -nats)).float()
    """

    def __call__(self, tokens: GateTokens, /) -> "Tensor":
        """Returns the gate of every token, [R] in [0, 1], a tensor of floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A response that the teacher has scored, as a filter sees it. Arrays are numpy's, and
    log-probabilities and entropies are in nats.
    """

    row: Row
    response: str
    response_ids: Int32Array  # [R], the end token included
    loss_mask: BoolArray  # [R]
    rollout_logprobs: Float32Array  # [R], of the student that sampled
    teacher_logprobs: Float32Array  # [R], of the tokens that were sampled
    teacher_entropy: Float32Array  # [R], of bounds the middle
    stop_reason: Literal["end_token", "length"]
    reward: float | None  # None without a reward, or where the reward function failed


class FilterFunction(Protocol):
    """A filter function decides whether a scored response is trained on. It is pure.

    Example, a filter that drops what was cut off, and what the teacher finds absurd::

        def keep(scored, *, nats=5.0):
            if scored.stop_reason == "length":
                return False
            return scored.teacher_logprobs.mean() > -nats
    """

    def __call__(self, scored: Scored, /) -> bool:
        """Returns whether the response is kept."""


class DataFunction(Protocol):
    """A data function yields the rows of a data set, which are read like those of a file. It yields
    the same rows in the same order each time: a run that is resumed calls it again.

    Example, sums of two numbers::

        def sums(*, largest=9):
            for left in range(largest + 1):
                for right in range(largest + 1):
                    yield {"prompt": f"{left} + {right} =", "answer": str(left + right)}
    """

    def __call__(self) -> Iterable[Mapping[str, object]]:
        """Yields rows: text, numbers, lists and mappings by the names of their columns."""


class GraderFunction(Protocol):
    """A grader function decides whether a response to a benchmark's question is right.

    Example, a grader that takes a number within a tolerance::

        def close(response, reference, *, within=0.01):
            words = response.split()
            try:
                return abs(float(words[-1]) - float(reference)) <= within
            except (IndexError, ValueError):
                return None
    """

    def __call__(self, response: str, reference: Reference, /) -> bool | None:
        """Returns whether the response is right; None where it holds no answer at all.

        Args:
            response: the text of the response, without special tokens.
            reference: the accepted answer of the row, or a tuple of several.
        """


def load(key: str, function: str, kind: type, options: Mapping[str, object]) -> Callable[..., Any]:
    """Imports a function, and binds its options.

    Example: ``load("loss.gate.function", "gates:narrow", GateFunction, {"tau": 1.0})`` returns
    ``partial(gates.narrow, tau=1.0)``.

    Args:
        key: the key of the config that names it, for messages.
        function: ``package.module:name``.
        kind: one of the Protocols above, whose parameters the function must take.
        options: further keyword arguments.

    Raises:
        ConfigError: names the function, and what is wrong: how it is written, a module that is not
            found or does not load, a name that is not there, something that cannot be called, or
            parameters and options that do not fit.
    """
    try:
        module_name, name = split_function(function)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None

    module = _import(key, function, module_name)
    where = f"{key}: {function}"
    if not hasattr(module, name):
        file = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{where}: there is no {name!r} in {file}")

    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{where}: is {type(found).__name__}, which cannot be called")

    _require_parameters(where, found, kind, options)

    return partial(found, **options)


def rows_of(key: str, function: str, options: Mapping[str, object]) -> list[Row]:
    """Calls a data function; returns its rows.

    Raises:
        ConfigError: it cannot be loaded, raises, yields no rows, or something that is no mapping by
            name.
    """
    data = load(key, function, DataFunction, options)
    rows: list[Row] = []

    try:
        found = data()
        if inspect.iscoroutine(found):
            found.close()

        if not isinstance(found, Iterable):
            what = "None" if found is None else f"a value of type {type(found).__name__}"
            raise ConfigError(f"{key}: {function}: returned {what}; it must yield rows")

        for number, row in enumerate(found, start=1):
            rows.append(_checked(row, f"{key}: {function}: row {number}"))
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a user's code raises what it likes, SystemExit too
        raise ConfigError(f"{key}: {function}: {cause_of(error)}") from None

    return rows


def _checked(row: object, where: str) -> Row:
    """Returns a copy of a row, which its function may change for the next one, and which goes to the
    processes of other functions.

    Raises:
        ConfigError: it is no mapping by name, or cannot be copied.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"{where} is {type(row).__name__}; every row must be a mapping from names of columns "
            "to values"
        )

    if others := [name for name in row if not isinstance(name, str)]:
        raise ConfigError(f"{where} has a column {others[0]!r}; names of columns are text")

    try:
        return cast(Row, _plain(pickle.loads(pickle.dumps(row))))
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply, or holds itself") from None
    except Exception as error:  # noqa: BLE001 - a class of the user may raise what it likes
        raise ConfigError(
            f"{where} holds what cannot be copied to another process: {error}"
        ) from None


def _plain(value: object) -> object:
    """Returns a value as JSON would have it: lists in place of tuples and arrays, and Python's numbers
    in place of numpy's, as they are written (0.1 for ``float32(0.1)``).
    """
    if isinstance(value, np.floating):
        return float(str(value))

    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)

    if isinstance(value, np.generic):
        return value.item()

    if isinstance(value, np.ndarray):
        return _plain(list(value) if value.ndim else value[()])

    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}

    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]

    return value


def cause_of(error: BaseException) -> str:
    """Returns what was raised, and the last line of the user's on the way there, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    last = (own or frames)[-1:]
    place = f" ({last[0].filename}:{last[0].lineno})" if last else ""
    if isinstance(error, SyntaxError):  # its text says where
        place = ""

    said = " ".join(str(error).split())
    cause = f"raised {type(error).__name__}{': ' if said else ''}{said}{place}"

    # the name of a file may be no UTF-8, and this is written to files that are
    return cause.encode(errors="backslashreplace").decode()


def sources(functions: Mapping[str, str]) -> dict[str, str]:
    """Returns where functions come from, by the same keys, for ``versions.json``.

    Example: ``{"loss.gate.function": "gates:narrow"}`` becomes ``{"loss.gate.function":
    "gates:narrow, version 0.2, sha256 9f86d081..."}``. The hash is of the names and contents of all
    Python files of the module's top-level package.
    """
    return {key: _source(function) for key, function in functions.items()}


def _source(function: str) -> str:
    _look_in_working_directory()
    module_name, _ = split_function(function)
    module, top = importlib.import_module(module_name), module_name.partition(".")[0]
    version, digest = _version(top), hashlib.sha256()

    for name, file in _files(sys.modules.get(top, module)):
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)

    of_version = f", version {version}" if version else ""

    return f"{function}{of_version}, sha256 {digest.hexdigest()}"


def search_path() -> list[str]:
    """Returns where modules are looked for, for a child of this process that must find the same."""
    _look_in_working_directory()
    return [os.path.abspath(entry) for entry in sys.path]


def _import(key: str, function: str, module_name: str) -> ModuleType:
    _look_in_working_directory()

    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a module raises what it likes, SystemExit too
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{key}: {function}: there is no module {missing}, neither installed nor in "
                f"the working directory {os.getcwd()}"
            ) from None

        cause = cause_of(error)
        raise ConfigError(f"{key}: {function}: importing {module_name} {cause}") from None


def _look_in_working_directory() -> None:
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        sys.path.append(directory)


def _require_parameters(
    where: str, found: Callable[..., Any], kind: type, options: Mapping[str, object]
) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # one that is written in C may have none
        return

    names = [name for name in inspect.signature(kind.__call__).parameters if name != "self"]

    try:
        signature.bind(*names, **options)
    except TypeError as error:
        needed = ", ".join(names) or "no argument"
        given = f" and the options {', '.join(options)}" if options else ""
        raise ConfigError(
            f"{where}: its parameters are {signature}, it is called with {needed}{given}: {error}"
        ) from None


def _files(module: ModuleType) -> list[tuple[str, Path]]:
    """Returns the Python files of a module or package, by their names within it, in order."""
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    if not roots:
        file = getattr(module, "__file__", None)
        return [(Path(file).name, Path(file))] if file else []

    files = [(root, file) for root in roots for file in root.rglob("*.py")]
    return sorted((str(file.relative_to(root)), file) for root, file in files)


def _version(top: str) -> str | None:
    """Returns the version of the distribution that holds a top-level module, or what the module
    says itself.
    """
    distributions = importlib.metadata.packages_distributions().get(top, ())
    if distributions:
        return importlib.metadata.version(distributions[0])

    said = getattr(sys.modules.get(top), "__version__", None)
    return None if said is None else str(said)
