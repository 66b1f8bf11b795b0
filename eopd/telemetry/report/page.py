"""Makes one HTML file of runs: what goes where on the page. Its text, style and script are the
files beside this one.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from eopd.config import ConfigError
from eopd.telemetry.report.groups import arms_of, compared, groups_of
from eopd.telemetry.report.headline import comparison, headline, measured_differently
from eopd.telemetry.report.healthy import minus
from eopd.telemetry.report.lines import look
from eopd.telemetry.report.measured import histograms, measured
from eopd.telemetry.report.objective import lead_of, objective_of
from eopd.telemetry.report.reading import RunRecord, read_runs
from eopd.telemetry.report.samples import ENTROPY_EDGES, KL_EDGES, count_prompts, prompts_of
from eopd.telemetry.report.seconds import STAGES, accounts, splits, timelines
from eopd.telemetry.report.subject import subject
from eopd.telemetry.report.terms import TERMS, anchor, explained
from eopd.telemetry.report.training import breaches, collapses, training

logger = logging.getLogger(__name__)

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader(__name__, ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_ENVIRONMENT.filters |= {"explained": explained, "anchor": anchor, "minus": minus}


def write_report(
    directories: Sequence[Path],
    output: Path,
    *,
    public: bool = False,
    leave_out: Callable[[str], None] | None = None,
) -> None:
    """Write the report of one run, or of several side by side; seeds of one arm are grouped.

    Args:
        directories: the run directories.
        output: the HTML file.
        public: whether to leave out paths, hosts and users.
        leave_out: is told which runs cannot be shown, and why.

    Raises:
        ConfigError: as in ``read_runs``.
        OSError: ``output`` cannot be written.
    """
    runs = read_runs(directories, public=public, leave_out=leave_out)
    output.write_text(render(runs), encoding="utf-8")


def report_of_ended(directory: Path, output: Path) -> None:
    """Write the report of a run that has ended. A report that fails is logged, and changes nothing
    of how the run ended.
    """
    try:
        write_report([directory], output)
    except ConfigError as nothing_to_show:
        logger.info("no report: %s", nothing_to_show)
    except Exception:
        logger.warning("%s could not be written", output, exc_info=True)


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the whole page. Of runs that are grouped by arm, the parts that cannot be averaged
    show the first of each arm.
    """
    groups = groups_of(runs)
    shown = [group.runs[0] for group in groups]

    return _ENVIRONMENT.get_template("page.html").render(
        made=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        groups=groups,
        shown=shown,
        look=look,
        terms=TERMS,
        arms=_arms(runs),
        cards=[_card(run) for run in shown],
        other_cards=[_card(run) for run in runs if run not in shown],
        comparison=comparison(runs),
        differently=measured_differently(runs),
        objective=objective_of(shown[0]),
        lead=lead_of(shown),
        prompts=prompts_of(shown),
        num_prompts=count_prompts(shown),
        thresholds=sorted({run.threshold for run in shown if run.threshold is not None}),
        entropy_edges=ENTROPY_EDGES,
        kl_edges=KL_EDGES,
        measured=measured(groups),
        training=training(groups),
        histograms=histograms(shown),
        accounts=accounts(shown),
        splits=splits(shown),
        timelines=timelines(shown),
        stages=STAGES,
        settings=_table([run.config for run in runs]),
        versions=_table([run.versions for run in runs]),
    )


def _card(run: RunRecord) -> Mapping[str, Any]:
    """Returns what stands at the top of the page about a run."""
    return {
        **headline(run),
        "subject": subject(run),
        "breaches": breaches(run),
        "collapses": collapses(run),
    }


def _arms(runs: Sequence[RunRecord]) -> Mapping[str, Any]:
    """Returns the table of arms; nothing where no arm has several seeds."""
    if not (arms := arms_of(runs)):
        return {}

    return {"seeds": [len(set(arm.seeds)) for arm in arms], "rows": compared(runs, arms)}


def _table(columns: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str], bool]]:
    """Returns (key, its value in each column, whether they differ), those that differ first."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = []
    for key in keys:
        values = [_written(column.get(key, "-")) for column in columns]
        rows.append((key, values, len(set(values)) > 1))

    return sorted(rows, key=lambda row: not row[2])


def _written(value: object) -> str:
    """Returns a setting as YAML has it: ``null`` and ``true`` in the place of Python's words."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
