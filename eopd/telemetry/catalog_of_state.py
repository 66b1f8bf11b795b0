"""The metrics of the run itself, a part of the catalogue: what it is, what it does, what it is short
of.
"""

from typing import Final

from eopd.telemetry.metric import (
    Metric,
    bytes_metric,
    number_metric,
    ratio_metric,
    seconds_metric,
)

STATE: Final = (
    number_metric(
        "eopd_run_info",
        "1; the labels say what runs: eopd's version, the commit of the working directory, the "
        "learner's incarnation, the models' names, the first digits of the config's SHA-256, and "
        "the driver's machine.",
        "1; another incarnation is a learner that was started again.",
        ("version", "commit", "incarnation", "student", "teachers", "config", "node"),
    ),
    number_metric(
        "eopd_phase",
        "1 for what the run does now, 0 for the rest: starting, training, measuring, saving (a "
        "checkpoint, or an export), ended (on its last step, or because somebody asked).",
        "training, most of the time.",
        ("phase",),
    ),
    seconds_metric(
        "eopd_phase_timestamp_seconds",
        "When the run began what it does now, in seconds since 1970.",
        "Long ago while it trains, else minutes ago.",
    ),
    number_metric(
        "eopd_engines_wanted",
        "Rollout engines that the run should have: those that take work, and those being started.",
        "rollout.engines, or what eopd scale asked for.",
    ),
    number_metric(
        "eopd_teacher_replicas_wanted",
        "Replicas that a teacher should have: those that take work, and those being started.",
        "teachers[].replicas.",
        ("teacher",),
    ),
    ratio_metric(
        "eopd_restart_budget_ratio",
        "Workers lost within cluster.restart_window_s, over as many as cluster.max_restarts allows; "
        "0 where it allows none.",
        "0; above 1 the run ends.",
    ),
    bytes_metric(
        "eopd_run_free_bytes",
        "Free space where the run directory is.",
        "Room for two checkpoints; a disk that is full ends the run.",
    ),
    bytes_metric(
        "eopd_checkpoint_bytes",
        "Size of the newest checkpoint of this process.",
        "Constant.",
    ),
    seconds_metric(
        "eopd_checkpoint_age_seconds",
        "Time since the newest checkpoint of this process was written, or since it took up the run: "
        "what is lost where it is killed.",
        "Up to the time of checkpoint.every steps.",
    ),
    seconds_metric(
        "eopd_response_quantile_seconds",
        "Quantiles of the time that an engine took for a response of the batch.",
        "0.99 within a few times the median; a synchronous step waits for the longest.",
        ("q",),
    ),
    seconds_metric(
        "eopd_scoring_quantile_seconds",
        "Quantiles of the time that a teacher took for a response of the batch, its queue included.",
        "Below those of writing it.",
        ("q",),
    ),
    Metric(
        "gauge",
        "tokens",
        "eopd_response_tokens_quantile",
        "Quantiles of the response length of the batch.",
        "0.99 below the limit.",
        ("q",),
    ),
)
