"""One step's row: from headers, the learner's numbers and clocks. Metrics are returned values; the
pipeline's caller publishes them.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from eopd.config import Config
from eopd.config.loss import HardGate, SigmoidGate
from eopd.run.record import Row
from eopd.telemetry.rows import series
from eopd.types import Header, LearnerStats, LossReason, PublishStats, StopReason

STALENESS_AGES: Final = ("0", "1", "2", "3", "4_or_more")
Span = tuple[float, float]


class BusyClock:
    """When at least one of something was under way; enter it around each."""

    def __init__(self) -> None:
        self._active = 0
        self._since = 0.0
        self._spans: list[Span] = []

    def __enter__(self) -> None:
        if self._active == 0:
            self._since = time.monotonic()

        self._active += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active -= 1
        if self._active == 0:
            self._spans.append((self._since, time.monotonic()))

    def lap(self) -> list[Span]:
        """The spans since the last lap, from and to, in seconds of the monotonic clock."""
        now = time.monotonic()
        spans = [*self._spans, (self._since, now)] if self._active else self._spans
        self._spans, self._since = [], now
        return spans


class Totals:
    """What only grows, over the life of the run."""

    def __init__(self, *, tokens: int = 0, trajectories: int = 0) -> None:
        self.tokens = tokens
        self.trajectories = trajectories

    def add(self, headers: Sequence[Header]) -> None:
        """Count a trained batch."""
        self.tokens += sum(h.num_response_tokens for h in headers)
        self.trajectories += len(headers)


def batch_row(headers: Sequence[Header], version: int) -> dict[str, float]:
    """Lengths, endings and staleness of a batch consumed at learner version ``version``."""
    count = len(headers)
    staleness = [version - h.oldest_version for h in headers]
    ages = [STALENESS_AGES[min(age, len(STALENESS_AGES) - 1)] for age in staleness]
    ended = sum(h.stop_reason is StopReason.END_TOKEN for h in headers)

    return {
        "eopd_response_tokens_mean": sum(h.num_response_tokens for h in headers) / count,
        "eopd_end_token_ratio": ended / count,
        "eopd_truncated_ratio": 1.0 - ended / count,
        "eopd_staleness_mean": sum(staleness) / count,
        "eopd_staleness_max": float(max(staleness)),
    } | {
        series("eopd_staleness_ratio", versions=age): ages.count(age) / count
        for age in STALENESS_AGES
    }


def config_row(config: Config) -> Row:
    """What rules and dashboards compare a run with."""
    row = {
        "eopd_batches": float(config.run.batches),
        "eopd_staleness_bound": float(config.flow.max_staleness),
    }
    gate = config.loss.gate
    return row | (
        {"eopd_gate_threshold_nats": gate.tau} if isinstance(gate, HardGate | SigmoidGate) else {}
    )


def resident_bytes() -> float:
    """What this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def step_row(
    headers: Sequence[Header],
    stats: LearnerStats,
    published: PublishStats,
    *,
    seconds: Mapping[str, float],
    totals: Totals,
    lost: Mapping[LossReason, int],
    dropped: int,
    in_flight: int,
    ready: int,
) -> Row:
    """The row of one completed step. ``seconds`` has step, generate, score, wait, its two
    parts, train and weights.
    """
    row = dict(stats.metrics) | batch_row(headers, stats.version.step - 1)
    row |= {f"eopd_{stage}_seconds": spent for stage, spent in seconds.items()}
    row |= {
        "eopd_step": float(stats.version.step),
        "eopd_last_step_timestamp_seconds": time.time(),
        "eopd_in_flight_trajectories": float(in_flight),
        "eopd_ready_trajectories": float(ready),
        "eopd_response_tokens_per_second": sum(h.num_response_tokens for h in headers)
        / seconds["step"],
        "eopd_response_tokens_total": float(totals.tokens),
        "eopd_trajectories_total": float(totals.trajectories),
        "eopd_dropped_trajectories_total": float(dropped),
        "eopd_weight_transfer_seconds": published.transfer_s,
        "eopd_weight_pause_seconds": published.pause_s,
        "eopd_weight_bytes": float(published.num_bytes),
    }
    if published.probe_nats is not None:
        row["eopd_weight_probe_nats"] = published.probe_nats

    return row | {
        series("eopd_lost_trajectories_total", reason=reason.value): float(lost.get(reason, 0))
        for reason in LossReason
    }
