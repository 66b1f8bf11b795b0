"""What a job on a cluster gets of this machine's files: the config, the files of the working
directory that it names, and the modules of the user's functions.

In: a config as it was written. Out: ``JobFiles``, which are copied into a folder of their own, and
uploaded. Left out: whatever no config names, such as runs, checkpoints, models and environments.
"""

import ast
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from eopd.config import Config, ConfigError
from eopd.config.base import DATA_SUFFIXES, split_function
from eopd.config.chain import read_chain
from eopd.config.names import ModelName

# The job server takes requests of 100 MiB (``DASHBOARD_CLIENT_MAX_SIZE`` of Ray 2.60); the files
# are one of them, in an archive that does not compress them.
MOST_BYTES: Final = 95 << 20
_SHARED: Final = "give an absolute path that every node of the cluster sees"
_OURS: Final = "eopd"  # is installed on every node
_SHOWN: Final = 3
_MODEL: Final = re.compile(r"(student|teachers(\.\d+)?)\.model")


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files of a job by their places in its working directory, and which is the config."""

    config: str
    files: Mapping[str, Path]

    def copy_to(self, directory: Path) -> None:
        """Copies the files into a directory, each to its place."""
        for place, file in self.files.items():
            copy = directory / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def files_of_job(
    path: Path, config: Config, leaves: Mapping[str, object], include: Sequence[Path] = ()
) -> JobFiles:
    """Finds what the job of a config needs of the working directory.

    Args:
        path: the config file.
        config: what it holds.
        leaves: its values by dotted name, as they were written.
        include: files and folders besides, which no config names.

    Raises:
        ConfigError: a path is of this machine alone, a file is missing, or there is too much.
    """
    _require_paths_of_the_cluster(leaves)
    files: dict[str, Path] = {}
    for key, file in _named(leaves):
        files[_place(key, file)] = file

    for extra in include:
        place = _place("--include", extra)
        if not extra.exists():
            raise ConfigError(f"--include {extra}: there is no such file or folder")

        files |= {str(Path(place, inner)): extra / inner for inner in _files_below(extra)}

    for module in _modules(config.functions.values()):
        files |= {str(module / inner): module / inner for inner in _files_below(module)}

    chain = [file.path for file in read_chain(path)]
    files |= {_place("extends", file): file for file in chain[:-1]}
    name = _place_of_config(path) if len(chain) == 1 else _place("config", path)
    files[name] = path
    _require_size(files)

    return JobFiles(config=name, files=files)


def _require_paths_of_the_cluster(leaves: Mapping[str, object]) -> None:
    """Checks that what a job writes and the models lie where the nodes see them, and not in the
    job's copy of the working directory, which is removed with the job.
    """
    written = {
        "run.directory": str(leaves.get("run.directory") or "runs"),
        "telemetry.discovery": str(leaves.get("telemetry.discovery") or "/"),
    }
    faults = [
        f"{key}: {folder} is relative, so a job would write into its copy of the working "
        f"directory, which is removed with it; {_SHARED}"
        for key, folder in written.items()
        if _is_relative(folder)
    ]

    for key, value in leaves.items():
        if not isinstance(value, str) or not _is_relative(value):
            continue

        is_path = _MODEL.fullmatch(key) is not None and ModelName.parse(value) is None
        if is_path or (key.endswith("model") and os.path.isdir(value)):
            faults.append(
                f"{key}: {value} is a relative path, and models are not uploaded with a job; "
                f"{_SHARED}, or a name of the Hub"
            )

    if faults:
        raise ConfigError("\n".join(faults))


def _named(leaves: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    """Yields the files that values of a config name by a relative path, with the keys.

    Raises:
        ConfigError: data are not there.
    """
    for key, value in leaves.items():
        if not isinstance(value, str) or not _is_relative(value):
            continue

        if os.path.isfile(value):
            yield key, Path(value)
        elif _names_data(key) and Path(value).suffix in DATA_SUFFIXES:
            raise ConfigError(f"{key}: {value} cannot be read here, to be uploaded; {_SHARED}")


def _names_data(key: str) -> bool:
    names = [part for part in key.split(".") if not part.isdigit()]
    return names[-1] in ("data", "held_out")


def _is_relative(path: str) -> bool:
    return path != "" and not path.startswith(("/", "~"))


def _place(key: str, path: Path) -> str:
    """Returns where in the job's working directory a file of this one belongs.

    Raises:
        ConfigError: it lies outside.
    """
    place = os.path.relpath(path)
    if place.split(os.sep)[0] == os.pardir:
        raise ConfigError(
            f"{key}: {path} lies outside the working directory {os.getcwd()}, of which a job gets "
            f"a copy; start in a folder that holds it, or {_SHARED}"
        )

    if os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise ConfigError(f"{key}: {path} leads out of the working directory first; write {place}")

    return place


def _place_of_config(path: Path) -> str:
    place = os.path.relpath(path)
    return path.name if place.split(os.sep)[0] == os.pardir else place


def _files_below(path: Path) -> Iterator[Path]:
    """Yields the files of a folder, relative to it, without hidden and compiled ones; ``.`` of a
    file.

    Raises:
        ConfigError: a link leads to a folder or to nothing, so that files would be left out.
    """
    if path.is_file():
        yield Path()
        return

    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if any(part.startswith(".") or part == "__pycache__" for part in inner.parts):
            continue

        if file.is_file():
            yield inner
        elif file.is_symlink():
            what = "a folder, and such links are not followed" if file.is_dir() else "nothing"
            raise ConfigError(
                f"{file}: is a link to {what}, so the job would miss it; put what it needs in its "
                "place"
            )


def _modules(functions: Iterable[str]) -> list[Path]:
    """Returns the modules of the working directory that functions are in, and those that these
    import: files, and packages as folders. Nothing is imported here.
    """
    waiting = [split_function(function)[0].partition(".")[0] for function in functions]
    seen, found = {_OURS}, []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue

        seen.add(name)
        if (module := _module_here(name)) is None:
            continue

        found.append(module)
        for inner in _files_below(module):
            if (file := module / inner).suffix == ".py":
                waiting += _imported(file)

    return found


def _module_here(name: str) -> Path | None:
    """Returns the module of a name in the working directory, unless Python finds another one
    before it.
    """
    package, file = Path(name), Path(f"{name}.py")
    is_file = file.is_file() and not (package / "__init__.py").is_file()
    here = file if is_file else package
    if not here.exists():
        return None

    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        return None

    places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
    found = [Path(place) for place in places if place is not None]

    return here if not found or any(_is_below(path, here) for path in found) else None


def _is_below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _imported(file: Path) -> Iterator[str]:
    """Yields the top-level names that a Python file imports, anywhere in it.

    Raises:
        ConfigError: it is no Python.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{file}: is no Python that can be read: {error}") from None

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _require_size(files: Mapping[str, Path]) -> None:
    sizes = {place: file.stat().st_size for place, file in files.items()}
    if (total := sum(sizes.values())) <= MOST_BYTES:
        return

    largest = sorted(sizes, key=lambda place: -sizes[place])[:_SHOWN]
    shown = ", ".join(f"{place} ({sizes[place] >> 20} MiB)" for place in largest)
    raise ConfigError(
        f"the files of the job have {total >> 20} MiB, and Ray's job server takes "
        f"{MOST_BYTES >> 20}: name the largest by absolute paths on a disk that every node "
        f"sees: {shown}"
    )
