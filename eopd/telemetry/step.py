"""Makes a step's row of headers, the learner's numbers and seconds. Metrics are returned values; the
pipeline's caller publishes them.
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from statistics import quantiles
from typing import Final

from eopd.config import Config
from eopd.config.loss import HardGate, SigmoidGate
from eopd.ledger import Ledger
from eopd.run.record import Row
from eopd.telemetry.series import series
from eopd.types import Header, LostReason, StepDone, StopReason

STALENESS_AGES: Final = ("0", "1", "2", "3", "4_or_more")
# What the learner does, one after the other: each moment of a step is of one of them.
PARTS: Final = {
    "wait_rollout": "waits for engines",
    "wait_teacher": "waits for teachers",
    "train": "trains",
    "weights": "sends weights",
}
MOST_SOURCES: Final = 16  # each is a series of its own
TAILS: Final = (50, 95, 99)  # percent


def batch_row(headers: Sequence[Header], version: int) -> dict[str, float]:
    """Returns lengths, endings, staleness, missing rewards, times and sources of a batch that was
    consumed at learner version ``version``.
    """
    count = len(headers)
    missing = sum(h.reward_fault is not None for h in headers)
    rewarded = missing + sum(h.reward is not None for h in headers)
    staleness = [version - h.oldest_version for h in headers]
    ages = [STALENESS_AGES[min(age, len(STALENESS_AGES) - 1)] for age in staleness]
    ended = sum(h.stop_reason is StopReason.END_TOKEN for h in headers)

    row = {
        "eopd_response_tokens_mean": sum(h.num_response_tokens for h in headers) / count,
        "eopd_end_token_ratio": ended / count,
        "eopd_truncated_ratio": 1.0 - ended / count,
        "eopd_staleness_mean": sum(staleness) / count,
        "eopd_staleness_max": float(max(staleness)),
    }
    for age in STALENESS_AGES:
        row[series("eopd_staleness_ratio", versions=age)] = ages.count(age) / count

    if rewarded:
        row["eopd_reward_missing_ratio"] = missing / rewarded

    lengths = [float(header.num_response_tokens) for header in headers]
    row |= _tails("eopd_response_tokens_quantile", lengths)
    for name, spent in (("response", "generate_s"), ("scoring", "score_s")):
        seconds = [header.sums[spent] for header in headers if spent in header.sums]
        row |= _tails(f"eopd_{name}_quantile_seconds", seconds)

    return row | _sources(headers)


def _tails(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns the quantiles of a metric; the highest is what a synchronous step waits for."""
    if not values:
        return {}

    pairs = [*values, *values] if len(values) == 1 else values  # one value has no quantiles
    percentiles = quantiles(pairs, n=100, method="inclusive")
    return {series(name, q=str(level / 100)): percentiles[level - 1] for level in TAILS}


def _sources(headers: Sequence[Header]) -> dict[str, float]:
    """Returns the share of every source, unless there are many."""
    names = Counter(re.sub(r"[^\w.-]", "_", header.source) for header in headers)
    if len(names) > MOST_SOURCES:
        return {}

    return {
        series("eopd_source_ratio", source=name): number / len(headers)
        for name, number in names.items()
    }


def config_row(config: Config) -> Row:
    """Returns the settings that alert rules and dashboards compare a run with."""
    row = {
        "eopd_batches": float(config.run.batches),
        "eopd_staleness_bound": float(config.flow.max_staleness),
    }
    gate = config.loss.gate
    return row | (
        {"eopd_gate_threshold_nats": gate.tau} if isinstance(gate, HardGate | SigmoidGate) else {}
    )


def ledger_row(ledger: Ledger) -> Row:
    """Returns how many trajectories the run has lost, dropped and filtered so far."""
    row = {
        "eopd_dropped_trajectories_total": float(len(ledger.dropped)),
        "eopd_filtered_trajectories_total": float(ledger.num_filtered),
    }
    for reason in LostReason:
        if reason is not LostReason.FILTERED:
            name = series("eopd_lost_trajectories_total", reason=reason.value)
            row[name] = float(ledger.lost[reason])

    return row


def step_row(done: StepDone) -> Row:
    """Returns the row of one completed step, without what the whole run has done so far
    (``Progress.row``, ``ledger_row``).
    """
    headers, stats, published = list(done.trained.values()), done.stats, done.published
    row = dict(stats.metrics) | batch_row(headers, stats.version.step - 1)
    for stage, spent in done.seconds.items():
        row[f"eopd_{stage}_seconds"] = spent
    num_tokens = sum(header.num_response_tokens for header in headers)
    row |= {
        "eopd_step": float(stats.version.step),
        "eopd_last_step_timestamp_seconds": time.time(),
        "eopd_in_flight_trajectories": float(done.in_flight),
        "eopd_ready_trajectories": float(done.ready),
        "eopd_step_accounted_ratio": sum(done.seconds[part] for part in PARTS)
        / done.seconds["step"],
        "eopd_response_tokens_per_second": num_tokens / done.seconds["step"],
        "eopd_weight_transfer_seconds": published.transfer_s,
        "eopd_weight_pause_seconds": published.pause_s,
        "eopd_weight_bytes": float(published.num_bytes),
    }
    if published.probe_nats is not None:
        row["eopd_weight_probe_nats"] = published.probe_nats
    return row
