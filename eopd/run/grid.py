"""The runs of a sweep are the product of its grids and its seeds, each with a name and a whole
config.

``--grid learner.lr=1e-5,3e-5 --grid loss.gate=hard,never --seeds 0..2`` makes four arms, such as
``learner.lr=1e-5, loss.gate=hard``, and twelve runs, such as ``lr-1e-5_gate-hard-seed-0``. They
stand in the order of their seeds, so that all arms can be compared early.
"""

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from eopd.config import Config, ConfigError, RunConfig, load_config, make_section
from eopd.config.document import DocumentError, read_items
from eopd.config.load import flatten
from eopd.config.teacher import NAME, NAME_WORDS
from eopd.run.arms import group_runs
from eopd.run.directory import RunDirectory

MOST_SEEDS: Final = 1000
MOST_RUNS: Final = 1000
LONGEST_VALUE: Final = 40

_SEEDS = re.compile(r"([0-9]{1,20})(?:\.\.([0-9]{1,20}))?")
_SET_ELSEWHERE: Final = {
    "run.seed": "name seeds with --seeds",
    "run.name": "runs are named after their arm and seed",
    "run.directory": "set it for all runs: --set run.directory=...",
}

_OPTIONS: Final = {"seed": "--seeds", "name": "the name of a run"}

Grids = Mapping[str, Sequence[str]]  # the texts of the values of each key
Status = Literal["waiting", "running", "completed", "collapsed", "interrupted", "failed"]


@dataclass(slots=True, kw_only=True)
class SweepRun:
    """A run of a sweep, and what became of it so far. ``arm`` has the settings of the grids, and is
    empty without any.
    """

    arm: str
    config: Config
    status: Status = "waiting"
    error: str | None = None

    @property
    def name(self) -> str:
        """Returns the name of the run, and of its directory."""
        return self.config.run.name

    @property
    def directory(self) -> RunDirectory:
        """Returns the directory of the run."""
        return RunDirectory(self.config.run.path)

    @property
    def log(self) -> Path:
        """Returns the file of what the run prints, in the directory of the sweep."""
        return self.config.run.directory / "logs" / f"{self.name}.log"


def read_grids(options: Sequence[str], overrides: Sequence[str] = ()) -> Grids:
    """Reads ``--grid KEY=VALUE,VALUE``; a comma inside of brackets or quotes belongs to a value.

    Raises:
        ConfigError: an option has no key or no value, its key stands twice, also in ``--set``, or
            its values would discard what was set below its key.
    """
    grids: dict[str, Sequence[str]] = {}
    fixed = {override.partition("=")[0] for override in overrides}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"--grid {option}: must be section.key=value,value")

        if key in _SET_ELSEWHERE:
            raise ConfigError(f"--grid {option}: {_SET_ELSEWHERE[key]}")

        if key in grids:
            raise ConfigError(f"--grid {option}: {key} stands twice; write all values in one")

        if key in fixed:
            raise ConfigError(f"--grid {option}: {key} is in --set too; remove one of the two")

        if below := [other for other in (*fixed, *grids) if other.startswith(f"{key}.")]:
            raise ConfigError(
                f"--grid {option}: its values replace all of {key}, so that {below[0]} would be "
                "lost; write it into the values, such as --grid 'loss.gate={kind: hard, tau: "
                "0.3},never', or vary a single key, such as loss.gate.kind"
            )

        try:
            values = read_items(text)
        except DocumentError as error:
            raise ConfigError(f"--grid {option}: {str(error).replace('line 1: ', '')}") from None

        if not values:
            raise ConfigError(f"--grid {option}: names no value; write {key}=value,value")

        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"--grid {option}: the value {twice[0]} stands twice")

        grids[key] = values

    return grids


def read_seeds(text: str) -> list[int]:
    """Reads ``--seeds``: numbers and ranges such as ``0..4``, which holds both its ends.

    Raises:
        ConfigError: a part is neither, a range falls, or a seed stands twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--seeds {text}: must be such as 0..4 or 0,1,7 (has {part!r})")

        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"--seeds {text}: the range {part} falls; write {last}..{first}")

        if len(seeds) + last - first >= MOST_SEEDS:
            raise ConfigError(f"--seeds {text}: names more than {MOST_SEEDS} seeds")

        seeds += range(first, last + 1)

    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"--seeds {text}: the seed {twice[0]} stands twice")

    return seeds


def plan_runs(
    path: Path,
    overrides: Sequence[str],
    grids: Grids,
    seeds: Sequence[int] | None = None,
    name: str | None = None,
) -> tuple[Path, list[SweepRun]]:
    """Loads the config of every run of a sweep.

    Args:
        path: the config file.
        overrides: settings of all runs.
        grids: the values of each key, of which every combination is an arm.
        seeds: those of every arm; None for the config's own.
        name: of the sweep; None for that of the config, with ``-sweep`` behind it.

    Returns:
        The directory of the sweep, and its runs in the order in which they are to be run.

    Raises:
        ConfigError: a config is wrong, which the message names by its arm, or two arms are the same.
    """
    combinations = list(itertools.product(*grids.values()))
    if len(combinations) * len(seeds or [0]) > MOST_RUNS:
        raise ConfigError(f"--grid: these grids and seeds make more than {MOST_RUNS} runs")

    arms = [dict(zip(grids, values, strict=True)) for values in combinations]
    bases = [_load(path, overrides, arm) for arm in arms]
    _require_different(arms, bases)

    run = bases[0].run
    directory = run.directory / _name_of(name or f"{run.name}-sweep")
    runs = [
        _run(directory, arm, seed, base)
        for seed in (seeds or [run.seed])
        for arm, base in zip(arms, bases, strict=True)
    ]
    _require_names(runs)

    return directory, runs


def _name_of(sweep: str) -> str:
    if not re.fullmatch(NAME, sweep):
        raise ConfigError(f"--name {sweep}: must be {NAME_WORDS}")

    return sweep


def _run(directory: Path, arm: Mapping[str, str], seed: int, base: Config) -> SweepRun:
    parts = [f"{_short(key, arm)}-{_slug(value)}" for key, value in arm.items()]
    name = f"{'_'.join(parts)}{'-' if parts else ''}seed-{seed}"
    own = {"name": name, "directory": directory, "seed": seed}
    if (upload := base.run.upload) is not None:  # apart from the runs of other sweeps
        own["upload"] = f"{upload.rstrip('/')}/{directory.name}"

    run = make_section(RunConfig, _OPTIONS, **base.run.model_dump() | own)
    return SweepRun(arm=_label(arm), config=base.model_copy(update={"run": run}))


def _load(path: Path, overrides: Sequence[str], arm: Mapping[str, str]) -> Config:
    settings = [f"{key}={value}" for key, value in arm.items()]
    try:
        return load_config(path, [*overrides, *settings])
    except ConfigError as error:
        message = str(error)
        for setting in settings:
            message = message.replace(f"--set {setting}:", f"--grid {setting}:")

        if message == str(error) and arm:
            message = f"arm {_label(arm)}: {message}"

        raise ConfigError(message) from None


def _require_different(arms: Sequence[Mapping[str, str]], configs: Sequence[Config]) -> None:
    """Raises ConfigError where two arms would compute the same."""
    flat = [flatten(config.model_dump(mode="json")) for config in configs]
    for group in group_runs(flat):
        if len(group.runs) > 1:
            first, second, *_ = (_label(arms[run]) for run in group.runs)
            raise ConfigError(f"--grid: the arms {first} and {second} are the same run; remove one")


def _require_names(runs: Sequence[SweepRun]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--grid: two runs would have the name {twice}; shorten the values")


def _label(arm: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arm.items())


def _short(key: str, arm: Mapping[str, str]) -> str:
    """Returns the last part of a key, or all of it where another key of the arm ends alike."""
    last = key.rpartition(".")[2]
    alike = [other for other in arm if other.rpartition(".")[2] == last]
    return last if len(alike) == 1 else key


def _slug(value: str) -> str:
    """Returns a value as part of a name; one that had to be changed gets a checksum."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-")[:LONGEST_VALUE]
    return slug if slug == value else f"{slug}-{zlib.crc32(value.encode()):08x}".lstrip("-")
