"""An evaluation as metrics, and as a line for people."""

from collections.abc import Mapping
from typing import Final

from eopd.config.benchmark import HELD_OUT
from eopd.run.evaluations import Evaluation
from eopd.run.record import Best, Row
from eopd.telemetry.series import series

# What is measured on the held-out prompts: how people call it, and its unit, which ends its metric.
MEASURED: Final[Mapping[str, tuple[str, str]]] = {
    "reverse_kl": ("reverse KL", "nats"),
    "forward_kl": ("forward KL", "nats"),
    "top1_agreement": ("top-1 agreement", "ratio"),
    "student_entropy": ("student entropy", "nats"),
    "teacher_entropy": ("teacher entropy", "nats"),
}
# Of these, what a run is compared by with itself and with others.
COMPARED: Final = ("reverse_kl", "forward_kl", "student_entropy", "top1_agreement")

_BENCHMARK: Final = {
    "avg_at_n": "eopd_eval_avg_at_n_ratio",
    "response_tokens": "eopd_eval_response_tokens_mean",
    "truncation_rate": "eopd_eval_truncated_ratio",
    "lost": "eopd_eval_lost_trajectories",
    "not_graded": "eopd_eval_not_graded_trajectories",
}
_PASS_AT: Final = "pass_at_"
_SHOWN: Final = ("reverse_kl", "forward_kl", "top1_agreement", "avg_at_n")


def evaluation_row(evaluation: Evaluation) -> Row:
    """Returns the metrics of an evaluation, by the names of the catalogue."""
    name, row = evaluation.name, {}
    row[series("eopd_eval_step", evaluation=name)] = float(evaluation.step)
    row[series("eopd_eval_seconds", evaluation=name)] = evaluation.seconds

    for metric, measured in evaluation.measurements.items():
        if (key := _key(name, metric)) is not None:
            row[key] = measured.mean

    return row


def evaluation_line(evaluation: Evaluation) -> str:
    """Returns what was measured, in a line.

    Example: ``step 5, gsm8k: avg@4 0.512 ± 0.021 (+0.034 ± 0.012), pass@4 0.700 ± 0.030, 312.5
    tokens a response, 2.1% truncated, 0 lost, in 12.1 s``. In parentheses is the change since the
    first measurement. Of all pass@k it has that of the largest k.
    """
    parts = []
    measurements = evaluation.measurements
    for metric, measured in measurements.items():
        if metric not in (*_SHOWN, f"{_PASS_AT}{evaluation.samples}"):
            continue

        part = f"{_label(metric, evaluation.samples)} {measured.shown()}"
        if (change := evaluation.differences.get(metric)) is not None:
            part += f" ({change.shown('+')})"

        parts.append(part)

    if "response_tokens" in measurements:
        parts.append(f"{measurements['response_tokens'].mean:.1f} tokens a response")
        parts.append(f"{measurements['truncation_rate'].mean:.1%} truncated")

    if "lost" in measurements:
        parts.append(f"{measurements['lost'].mean:.0f} lost")

    if "not_graded" in measurements and measurements["not_graded"].mean:
        parts.append(f"{measurements['not_graded'].mean:.0f} not graded, since the grader failed")

    name = "held out" if evaluation.name == HELD_OUT else evaluation.name
    return f"step {evaluation.step}, {name}: {', '.join(parts)}, in {evaluation.seconds:.1f} s"


def best_line(best: Best) -> str:
    """Returns which checkpoint is the best, and by what, in a line."""
    return f"best checkpoint: step {best.step}, {best.metric} {best.value:.4f}"


def _key(name: str, metric: str) -> str | None:
    """Returns the series of a measurement, or None where it has none."""
    if name == HELD_OUT:
        return f"eopd_eval_{metric}_{MEASURED[metric][1]}" if metric in MEASURED else None

    if metric.startswith("distinct_"):
        n = metric.removeprefix("distinct_")
        return series("eopd_eval_distinct_ratio", benchmark=name, n=n)

    if metric.startswith(_PASS_AT):
        k = metric.removeprefix(_PASS_AT)
        return series("eopd_eval_pass_at_k_ratio", benchmark=name, k=k)

    found = _BENCHMARK.get(metric)
    return series(found, benchmark=name) if found else None


def _label(metric: str, samples: int) -> str:
    if metric in MEASURED:
        return MEASURED[metric][0]

    return f"avg@{samples}" if metric == "avg_at_n" else metric.replace("_at_", "@")
