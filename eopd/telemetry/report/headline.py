"""Says first what a person wants to know: how a run went, in a sentence and in a few numbers, and
how several runs compare.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from eopd.config.benchmark import HELD_OUT
from eopd.run.changes import kind_of
from eopd.run.evaluations import Evaluation
from eopd.run.record import Best, Measurement
from eopd.telemetry.evaluations import COMPARED, MEASURED
from eopd.telemetry.report.healthy import minus
from eopd.telemetry.report.reading import Record, RunRecord, parts

_RATE: Final = "tokens per second, in the steps"


def headline(run: RunRecord) -> Mapping[str, Any]:
    """Returns the sentence, the facts and the held-out numbers of a run."""
    last = run.rows[-1]
    seconds = sum(row["eopd_step_seconds"] for row in run.rows)
    tokens = last["eopd_response_tokens_total"]
    measured = run.measured(HELD_OUT)
    before = measured[0].measurements if measured and measured[0].phase == "before" else {}
    after = measured[-1].measurements if measured and measured[-1].phase != "before" else {}
    changes = measured[-1].differences if measured else {}
    age = {}
    if run.summary.status == "running":
        age = {"since then": clock(max(0.0, time.time() - last["time"]))}

    rows = {
        name: _change(label, unit, before.get(name), after.get(name), changes.get(name))
        for name, (label, unit) in {**MEASURED, **parts([before, after])}.items()
    }

    return {
        "name": run.name,
        "status": run.summary.status,
        "result": result(run),
        "notes": run.notes,
        "changes": [_changed(change) for change in run.changes],
        "best": _best(run.summary.best),
        "facts": {
            "steps": f"{last['step']} of {run.config.get('run.batches', '?')}",
            "response tokens": f"{tokens:,.0f}",
            _RATE: f"{tokens / seconds:.1f}",
            "wall time": clock(run.wall_s),
            "last step": time.strftime("%Y-%m-%d %H:%M", time.localtime(last["time"])),
            **age,
        },
        "after": f"after step {measured[-1].step}" if after and run.is_under_way else "after",
        "held_out": [row for name, row in rows.items() if name in MEASURED],
        "has_errors": any("±" in text for row in rows.values() for text in row.values()),
        "parts": [row for name, row in rows.items() if name not in MEASURED],
    }


def result(run: RunRecord) -> str:
    """Returns how far the student came towards its teacher, with the 95 % interval of the
    difference.
    """
    measured = [one for one in run.measured(HELD_OUT) if "reverse_kl" in one.measurements]
    if not measured:
        return (
            "Nothing was measured on held-out prompts, so that nothing can be said of the result."
        )

    first, last = measured[0], measured[-1]
    old, new = first.measurements["reverse_kl"], last.measurements["reverse_kl"]
    teacher = "teachers" if "teachers.1.model" in run.config else "teacher"
    if first is last:
        return (
            f"The student was {old.mean:.2f} nats from its {teacher} at step {first.step}, and was "
            "not measured again yet."
        )

    change = _difference(last, old, new)
    percent = (
        f" ({_signed(100 * change.mean / old.mean, '.0f')} %)" if round(old.mean, 2) > 0 else ""
    )
    what = _verb(change).format(
        old=old.mean,
        new=new.mean,
        teacher=teacher,
        percent=percent,
    )
    so_far = f"So far, at step {last.step}: " if run.is_under_way else ""
    return f"{so_far}{what}, measured on {last.prompts} held-out prompts{_interval(change)}."


def _difference(last: Evaluation, old: Measurement, new: Measurement) -> Measurement:
    """Returns the change of the reverse KL: paired by prompt where that was recorded, else as of
    two independent means.
    """
    if paired := last.differences.get("reverse_kl"):
        return paired

    errors = (old.standard_error, new.standard_error)
    both = None if None in errors else math.hypot(*filter(None, errors))
    return Measurement(mean=new.mean - old.mean, standard_error=both)


def _verb(change: Measurement) -> str:
    half = change.half_width
    if half is not None and abs(change.mean) <= half:
        return (
            "No change can be told from chance: the student was {old:.2f} and is {new:.2f} nats "
            "from its {teacher}{percent}"
        )

    came = "came" if change.mean < 0 else "went away,"
    return f"The student {came} from {{old:.2f}} to {{new:.2f}} nats of its {{teacher}}{{percent}}"


def _interval(change: Measurement) -> str:
    half = change.half_width
    if half is None:
        return ""

    low, high = (_signed(change.mean + sign * half, ".2f") for sign in (-1, 1))
    return f"; 95 % interval of the difference {low} to {high}"


def _signed(value: float, style: str) -> str:
    return minus(format(value, f"+{style}"))


def _best(best: Best | None) -> str:
    if best is None:
        return ""

    return f"Best checkpoint: step {best.step}, where {best.metric} was {best.value:.4g}."


def _changed(change: Record) -> str:
    """Returns from which step on which keys were set to what."""
    values = change.get("changes", {}).items()
    settings = [f"{key} {_plain(old)} → {_plain(new)}" for key, (old, new) in values]
    return f"From step {change['from_step']}: {'; '.join(settings)}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _change(
    label: str,
    unit: str,
    before: Measurement | None,
    after: Measurement | None,
    paired: Measurement | None,
) -> Mapping[str, str]:
    """Returns a row of the table; its change has an error where it is paired by prompt."""
    difference = ""
    if before is not None and after is not None:
        difference = minus((paired or Measurement(mean=after.mean - before.mean)).shown("+"))

    return {
        "label": label,
        "unit": unit,
        "before": _measured(before),
        "after": _measured(after),
        "change": difference,
    }


def comparison(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns what runs are compared by: a label, and the value in each run."""
    after = [run.final.get(HELD_OUT, {}) for run in runs]
    facts = [headline(run)["facts"] for run in runs]
    labels = {name: MEASURED[name][0] for name in COMPARED} | {
        name: label for name, (label, _) in parts(after).items()
    }
    rows = []
    for name, label in labels.items():
        values = [_measured(measurements.get(name)) for measurements in after]
        rows.append((f"held-out {label}, after", values))

    for name in ("response tokens", "wall time", _RATE):
        rows.append((name, [run_facts[name] for run_facts in facts]))

    return rows


def measured_differently(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the sections by which held-out numbers of the runs do not compare."""
    differing = []
    for section in ("teachers", "prompts.held_out", "evaluation", "rollout.temperature"):
        settings = [_settings(run, section) for run in runs]
        if any(other != settings[0] for other in settings):
            differing.append(section)

    return differing


def _settings(run: RunRecord, section: str) -> Mapping[str, object]:
    """Returns the keys of a section that change a held-out number."""
    return {
        key: value
        for key, value in run.config.items()
        if f"{key}.".startswith(f"{section}.")
        and not key.startswith("evaluation.benchmarks.")
        and kind_of(re.sub(r"\.\d+", "[]", key)) != "always"
    }


def _measured(measurement: Measurement | None) -> str:
    return "-" if measurement is None else minus(measurement.shown())


def clock(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
