"""What a sweep found: the final numbers of its runs, compared between arms over seeds, and
``sweep.json``.

    {"name": ..., "status": "completed", "grids": {KEY: [VALUE, ...]}, "seeds": [0, 1],
     "runs": [{"name", "arm", "seed", "status", "error", "log"}, ...],
     "arms": [{"arm", "settings", "seeds", "values", "means", "differences"}, ...]}

``values`` has the number of every seed by metric, ``means`` and ``differences`` have intervals of
95 %; differences are to the first arm, over the seeds that both have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from eopd.config import ConfigError
from eopd.config.benchmark import HELD_OUT
from eopd.config.load import flatten
from eopd.run.arms import Arm, Interval, by_seed, group_runs, interval, paired
from eopd.run.directory import RunDirectory
from eopd.run.evaluations import final, read_evaluations
from eopd.run.grid import Grids, SweepRun
from eopd.run.reading import read_object
from eopd.run.storage import write_whole

FILE: Final = "sweep.json"

Numbers = Mapping[str, float]  # by names such as ``held_out/reverse_kl``


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """What the runs of an arm measured at their ends; see the head of this file."""

    arm: str
    settings: Mapping[str, object]
    seeds: Sequence[int]
    values: Mapping[str, Mapping[int, float]]
    means: Mapping[str, Interval]
    differences: Mapping[str, Interval]


def compare(runs: Sequence[SweepRun]) -> list[ArmResult]:
    """Returns the result of every arm of a sweep, the first arm first."""
    numbers = [_numbers(run) for run in runs]
    arms = group_runs([flatten(run.config.model_dump(mode="json")) for run in runs])
    values = [_values(arm, numbers) for arm in arms]
    return [
        ArmResult(
            arm=runs[arm.runs[0]].arm,
            settings=arm.settings,
            seeds=arm.seeds,
            values=own,
            means=_known({name: interval(each.values()) for name, each in own.items()}),
            differences=_differences(values[0], own) if arm is not arms[0] else {},
        )
        for arm, own in zip(arms, values, strict=True)
    ]


def final_numbers(directory: RunDirectory) -> Numbers:
    """Returns what a run measured after its last batch, by ``NAME/METRIC``; nothing of a run that did
    not get there, such as one that collapsed.

    Raises:
        ConfigError: the summary of the run cannot be read.
    """
    summary = directory.read_summary()
    if summary is None or summary.status != "completed" or not summary.held_out.after:
        return {}

    benchmarks = final(read_evaluations(directory.evaluations), summary.steps)
    return {
        f"{name}/{metric}": measured.mean
        for name, measurements in {HELD_OUT: summary.held_out.after, **benchmarks}.items()
        for metric, measured in measurements.items()
    }


def write_sweep(path: Path, runs: Sequence[SweepRun], grids: Grids, status: str) -> list[ArmResult]:
    """Replaces ``sweep.json``, and returns the results in it."""
    results = compare(runs)
    rows = [
        {
            "name": run.name,
            "arm": run.arm,
            "seed": run.config.run.seed,
            "status": run.status,
            "error": run.error,
            "log": str(run.log),
        }
        for run in runs
    ]
    record = {
        "name": path.parent.name,
        "status": status,
        "grids": grids,
        "seeds": list(dict.fromkeys(run.config.run.seed for run in runs)),
        "runs": rows,
        "arms": [asdict(result) for result in results],
    }
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return results


def errors_before(path: Path) -> dict[str, str]:
    """Returns the error of every run that failed when the sweep ran last, by the name of the run."""
    runs = read_object(path).get("runs")
    rows = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    failed = [run for run in rows if run.get("status") == "failed"]
    return {str(run.get("name")): str(run.get("error")) for run in failed}


def _numbers(run: SweepRun) -> Numbers:
    try:
        return final_numbers(run.directory)
    except ConfigError:  # the run itself says so when it is taken up
        return {}


def _values(arm: Arm, numbers: Sequence[Numbers]) -> dict[str, dict[int, float]]:
    names = dict.fromkeys(name for run in arm.runs for name in numbers[run])
    return {name: by_seed(arm, [found.get(name) for found in numbers]) for name in names}


def _differences(
    first: Mapping[str, Mapping[int, float]], own: Mapping[str, Mapping[int, float]]
) -> dict[str, Interval]:
    return _known({name: paired(first[name], own[name]) for name in first if name in own})


def _known(intervals: Mapping[str, Interval | None]) -> dict[str, Interval]:
    return {name: each for name, each in intervals.items() if each is not None}
