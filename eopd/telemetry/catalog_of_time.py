"""The metrics of time, of rates and of weights, a part of the catalogue."""

from typing import Final

from eopd.telemetry.metric import (
    Metric,
    bytes_metric,
    nats_metric,
    ratio_metric,
    seconds_metric,
)

TIME: Final = (
    seconds_metric(
        "eopd_step_seconds",
        "From waiting for a batch to its weights being served.",
        "Steady after the first steps.",
    ),
    ratio_metric(
        "eopd_step_accounted_ratio",
        "Share of the step that both waits, training and the weights add up to.",
        "Above 0.95; the rest has no cause.",
    ),
    seconds_metric(
        "eopd_between_steps_seconds",
        "From the end of the step before to the start of this one: a checkpoint, the held-out "
        "prompts, the driver's own work. 0 for the first step.",
        "Small beside eopd_step_seconds, but after a checkpoint or a measurement.",
    ),
    seconds_metric(
        "eopd_last_step_timestamp_seconds",
        "When the last step ended, in seconds since 1970.",
        "Less than a few eopd_step_seconds ago.",
    ),
    seconds_metric(
        "eopd_generate_seconds",
        "Time of the step with a response being written.",
        "Follows the length.",
    ),
    seconds_metric(
        "eopd_score_seconds", "Time of the step with a response being scored.", "Below generation."
    ),
    seconds_metric(
        "eopd_wait_seconds",
        "Time of the step in which the learner had nothing of its batch to train on.",
        "Small when asynchronous.",
    ),
    seconds_metric(
        "eopd_wait_rollout_seconds",
        "The part of that wait until the last response of the batch was written.",
        "Small when asynchronous; most of the wait where the engines are the slowest part.",
    ),
    seconds_metric(
        "eopd_wait_teacher_seconds",
        "The rest of that wait: the whole batch was written, and some of it not scored.",
        "Small; most of the wait where the teachers are the slowest part.",
    ),
    seconds_metric(
        "eopd_train_seconds", "Time in which the learner trained on parts of the batch.", "Steady."
    ),
    Metric(
        "gauge",
        "FLOP per second",
        "eopd_learner_flops_per_second",
        "Mean rate of a learner rank's update, by the formula of eopd/learner/flops.py.",
        "Steady.",
    ),
    ratio_metric(
        "eopd_learner_mfu_ratio",
        "That rate over learner.peak_flops, where it is set: model FLOPs utilisation.",
        "Steady; PaLM reports 0.46 for its training.",
    ),
    seconds_metric(
        "eopd_weights_seconds",
        "From the update's end until every engine serves its weights.",
        "Below training.",
    ),
    seconds_metric(
        "eopd_weight_transfer_seconds",
        "Time the new weights travelled, while engines wrote on.",
        "Steady.",
    ),
    seconds_metric(
        "eopd_weight_pause_seconds",
        "Longest time an engine stood still to load them.",
        "Below one second.",
    ),
    nats_metric(
        "eopd_weight_probe_nats",
        "How far an engine's log-probabilities of a fixed text were from the learner's when "
        "last asked, on average.",
        "Below 0.001 in float32, below 0.2 in bfloat16.",
    ),
    seconds_metric(
        "eopd_checkpoint_seconds",
        "Time to write the newest checkpoint of this process; no step ends meanwhile.",
        "Steady, and small beside checkpoint.every steps.",
    ),
    Metric(
        "gauge",
        "steps",
        "eopd_checkpoint_step",
        "Step of the newest checkpoint: what a run that is killed goes on from.",
        "At most checkpoint.every below eopd_step.",
    ),
    bytes_metric("eopd_weight_bytes", "Bytes sent for one weight sync, per engine.", "Constant."),
)
