"""Groups runs that differ in their seed alone, for charts to draw as one, and compares the groups
over their seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eopd.config.benchmark import HELD_OUT
from eopd.run.arms import Arm, Interval, by_seed, group_runs, interval, paired
from eopd.telemetry.evaluations import COMPARED, MEASURED
from eopd.telemetry.report.healthy import minus
from eopd.telemetry.report.lines import Line, finite, mean
from eopd.telemetry.report.reading import RunRecord


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that charts draw as one curve: their mean, and a band from the lowest to the highest."""

    label: str
    runs: Sequence[RunRecord]

    def line(self, column: Callable[[RunRecord], Mapping[int, float | None]]) -> Line:
        """Returns the mean of what ``column`` has of each run by step, at the steps that all have,
        with the band; a gap where a run has none. Of one run there is no band.
        """
        columns = [column(run) for run in self.runs]
        steps = sorted(set.intersection(*map(set, columns)))
        values = [list(map(one.__getitem__, steps)) for one in columns]
        if len(columns) == 1:
            return Line("", steps, values[0])

        stacks = [finite(ys) for ys in zip(*values, strict=True)]
        whole = [ys if len(ys) == len(columns) else [] for ys in stacks]
        return Line(
            "",
            steps,
            [mean(ys) for ys in whole],
            lows=[min(ys, default=None) for ys in whole],
            highs=[max(ys, default=None) for ys in whole],
        )


def lines_of(
    groups: Sequence[Group], metrics: Mapping[str, str], line: Callable[[Group, str], Line]
) -> list[Line]:
    """Returns the line of every metric of every group. Colours tell groups apart, or metrics where
    there is one group; dashes tell metrics apart.

    Args:
        groups: what is drawn.
        metrics: names, and what the legend calls them.
        line: makes the line of a group and a metric, without its looks.
    """
    many = len(groups) > 1
    return [
        replace(
            line(group, name),
            label=f"{group.label}, {label}" if many else label,
            color=color if many else dash,
            dash=dash,
        )
        for color, group in enumerate(groups)
        for dash, (name, label) in enumerate(metrics.items())
    ]


def legend_of(groups: Sequence[Group], metrics: Mapping[str, str]) -> Mapping[str, str]:
    """Returns what the looks of ``lines_of`` mean, by class; nothing of a single metric."""
    many = len(groups) > 1
    looks = {
        f"c{'n' if many else dash} d{dash}": label for dash, label in enumerate(metrics.values())
    }
    return looks if len(metrics) > 1 else {}


@dataclass(frozen=True, slots=True)
class Compared:
    """A row of the table of arms: what was measured after training, its mean in every arm, and the
    difference of every arm to the first, paired by seed.
    """

    label: str
    means: Sequence[str]
    differences: Sequence[str]
    is_clear: Sequence[bool]


def arms_of(runs: Sequence[RunRecord]) -> list[Arm]:
    """Returns the arms of runs, where some arm has several seeds; none where no arm has."""
    arms = group_runs([run.config for run in runs])
    return arms if any(len(set(arm.seeds)) > 1 for arm in arms) else []


def groups_of(runs: Sequence[RunRecord]) -> list[Group]:
    """Returns the groups that charts draw: arms, or else every run by itself."""
    if not (arms := arms_of(runs)):
        return [Group(run.name, [run]) for run in runs]

    groups = []
    for arm in arms:
        groups.append(Group(arm.label or "all", [runs[index] for index in arm.runs]))

    return groups


def compared(runs: Sequence[RunRecord], arms: Sequence[Arm]) -> list[Compared]:
    """Compares the arms by what was measured on held-out prompts, and on benchmarks, after
    training.
    """
    rows = []
    for label, values in _results(runs).items():
        found = [by_seed(arm, values) for arm in arms]
        differences = [paired(found[0], other) for other in found[1:]]
        rows.append(
            Compared(
                label,
                [_shown(interval(one.values()), "") for one in found],
                ["", *(_shown(one, "+") for one in differences)],
                [False, *map(_is_clear, differences)],
            )
        )

    return rows


def _results(runs: Sequence[RunRecord]) -> Mapping[str, list[float | None]]:
    """Returns the last numbers of every run by label; None where a run has none."""
    labels = {(HELD_OUT, metric): MEASURED[metric][0] for metric in COMPARED}
    names = dict.fromkeys(name for run in runs for name in run.final if name != HELD_OUT)
    labels |= {(name, "avg_at_n"): f"{name}, avg@n" for name in names}
    results = {}
    for (name, metric), label in labels.items():
        found = [run.final.get(name, {}).get(metric) for run in runs]
        results[label] = [each.mean if each else None for each in found]

    return {label: values for label, values in results.items() if values.count(None) < len(runs)}


def _shown(found: Interval | None, sign: str) -> str:
    if found is None:
        return "-"

    shown = f"{found.mean:{sign}.3f}"
    if found.low is None or found.high is None:
        return minus(shown)

    return minus(f"{shown} ({found.low:{sign}.3f} to {found.high:{sign}.3f})")


def _is_clear(difference: Interval | None) -> bool:
    """Returns whether the interval of a difference leaves out 0."""
    if difference is None or difference.low is None or difference.high is None:
        return False

    return difference.low > 0.0 or difference.high < 0.0
