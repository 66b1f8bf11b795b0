"""Every metric once: its name, kind, unit, labels, meaning and healthy range.

The same name is the key in a row, in ``metrics.jsonl``, in Prometheus and on the dashboards. A
*row* is what one training step reports: a mapping from series to number. A series is a metric's
name, with its labels where it has any::

    {"eopd_step": 3.0, "eopd_loss": 1.25, 'eopd_lost_trajectories_total{reason="too_stale"}': 2.0}

Names follow Prometheus: base units, ``_total`` for what only grows (in a row: the total so far).
Terms of the objective are means over the loss tokens of the batch. Left out: histograms, since a
row carries numbers only.
"""

from collections.abc import Mapping
from typing import Final

from eopd.telemetry.catalog_of_evaluation import EVALUATION
from eopd.telemetry.catalog_of_state import STATE
from eopd.telemetry.catalog_of_time import TIME
from eopd.telemetry.metric import (
    Metric,
    bytes_metric,
    counter_metric,
    nats_metric,
    number_metric,
    ratio_metric,
    trajectories_metric,
    versions_metric,
)

ROLLED_BACK: Final = (
    "With a learner that was lost, and with --resume, it goes back to the checkpoint's."
)
OF_PROCESS: Final = "Counted since the process of the run started: 0 again where it goes on."

_OBJECTIVE: Final = (
    nats_metric(
        "eopd_loss",
        "The objective: clipped reverse KL plus alpha times the gated forward KL.",
        "Falls, then levels off; finite always.",
    ),
    nats_metric(
        "eopd_reverse_kl_nats",
        "Mean log p_old(y) - log q(y): how much surer of its own text the student is than "
        "the teacher.",
        "Falls towards 0; a rise together with the response length is the length run-away.",
    ),
    nats_metric(
        "eopd_forward_kl_nats",
        "Forward KL on the teacher's top k, gated or not.",
        "Falls, and is never negative.",
    ),
    nats_metric(
        "eopd_forward_kl_gated_nats",
        "Forward KL where the gate is open, over these tokens; 0 where there are none.",
        "Falls: this is the part that the forward term trains.",
    ),
    nats_metric(
        "eopd_forward_kl_ungated_nats",
        "Forward KL where the gate is shut, over these tokens; 0 where there are none.",
        "Small, and falls with the reverse KL.",
    ),
    ratio_metric(
        "eopd_gate_ratio",
        "Mean gate value: the share of tokens on which the forward KL acts.",
        "0.15 to 0.20 in the paper's setting once training settles; 0 means that the gate is shut.",
    ),
    ratio_metric(
        "eopd_gate_by_teacher_ratio",
        "Mean gate value, by the teacher that scored the trajectory.",
        "Close to one another, unless one teacher is surer.",
        ("teacher",),
    ),
    nats_metric(
        "eopd_gate_threshold_nats",
        "loss.gate.tau, where the gate has one.",
        "Constant, and below the teacher entropy's 0.9 quantile.",
    ),
    ratio_metric(
        "eopd_gate_uncertain_ratio",
        "How far the gate would move between the bounds on the teacher's entropy; 0 where "
        "the entropy is exact.",
        "0 with a teacher of ours; above 0.1 a stock server's candidates are too few for the gate.",
    ),
    number_metric(
        "eopd_reward_mean",
        "Mean reward of the batch's responses, where loss.reverse_kl.reward is set.",
        "Rises; the same throughout leaves no advantage to learn from.",
    ),
    ratio_metric(
        "eopd_reward_missing_ratio",
        "Share of the batch's responses for which the reward function failed, took too long, or "
        "returned no finite number. They are trained without a reward; logs/driver.log has why.",
        "0.",
    ),
    number_metric(
        "eopd_alpha_ratio",
        "Alpha of this batch, warm-up included.",
        "Reaches loss.alpha when the warm-up ends.",
    ),
    Metric(
        "gauge",
        "tokens",
        "eopd_loss_tokens",
        "Tokens of the batch that enter the loss.",
        "Steady; never 0.",
    ),
)

_DISTRIBUTIONS: Final = (
    nats_metric(
        "eopd_teacher_entropy_nats",
        "Teacher entropy over the whole vocabulary.",
        "Steady; a fall together with the gate share is the first sign of collapse.",
    ),
    nats_metric(
        "eopd_entropy_by_teacher_nats",
        "Teacher entropy over the whole vocabulary, by teacher.",
        "Close to eopd_teacher_entropy_nats; a fall of one is the collapse of what it teaches.",
        ("teacher",),
    ),
    nats_metric(
        "eopd_teacher_entropy_quantile_nats",
        "Quantiles of the teacher entropy over the batch's loss tokens.",
        "A median near 0 under a 0.9 quantile above the gate's threshold; all near 0 is collapse.",
        ("q",),
    ),
    nats_metric(
        "eopd_student_entropy_nats",
        "Student entropy over the whole vocabulary.",
        "Comes to the teacher's; far below it, diversity is being lost.",
    ),
    ratio_metric(
        "eopd_teacher_topk_mass_ratio",
        "Teacher probability on its top k.",
        "Above 0.9; lower, k is too small.",
    ),
    ratio_metric(
        "eopd_student_topk_mass_ratio",
        "Student probability on the teacher's top k.",
        "Rises to the teacher's.",
    ),
    ratio_metric(
        "eopd_topk_overlap_ratio",
        "Share of the teacher's top k that is in the student's top k.",
        "Rises.",
    ),
)

_OPTIMISATION: Final = (
    number_metric(
        "eopd_importance_weight_mean",
        "Mean truncated weight of the policy before the update against the one that sampled.",
        "Near 1; far from it, rollouts are stale or engine and trainer disagree.",
    ),
    ratio_metric(
        "eopd_importance_capped_ratio",
        "Share of tokens whose importance weight is capped.",
        "Below 0.05.",
    ),
    nats_metric(
        "eopd_logprob_gap_nats",
        "Mean |log p_old - log b| of the sampled tokens: staleness, and the numeric gap of "
        "engine and trainer.",
        "Below 0.05 at staleness 0; more points to a precision or weight-sync fault.",
    ),
    ratio_metric(
        "eopd_clipped_ratio",
        "Share of tokens whose policy ratio is clipped.",
        "0 at one optimiser step; below 0.2.",
    ),
    number_metric("eopd_grad_norm", "Gradient norm before clipping.", "Steady; spikes are rare."),
    number_metric(
        "eopd_learning_rate",
        "Learning rate of the last optimiser step.",
        "Follows learner.schedule.",
    ),
    Metric(
        "counter",
        "steps",
        "eopd_skipped_steps_total",
        "Optimiser steps skipped because their loss or gradient was not finite; "
        "runs/<name>/broken/ has them. " + ROLLED_BACK,
        "0; above learner.max_skipped_steps the run ends.",
    ),
)

_FLOW: Final = (
    Metric(
        "gauge",
        "steps",
        "eopd_step",
        "Completed batches, which is also the policy's version.",
        "Grows.",
    ),
    Metric(
        "gauge", "steps", "eopd_batches", "run.batches: the step that ends the run.", "Constant."
    ),
    Metric(
        "gauge",
        "tokens",
        "eopd_response_tokens_mean",
        "Mean response length of the batch.",
        "Steady; a climb to the limit is the length run-away.",
    ),
    ratio_metric(
        "eopd_end_token_ratio",
        "Share of the batch's responses that ended by themselves.",
        "High where the length limit is generous; a fall is collapse.",
    ),
    ratio_metric(
        "eopd_truncated_ratio",
        "Share of the batch's responses cut by the length limit.",
        "Low; a rise is collapse.",
    ),
    ratio_metric(
        "eopd_repetition_ratio",
        "Mean share of a response's runs of four tokens that it has written before.",
        "Steady and low; a rise with the response length is collapse.",
    ),
    number_metric(
        "eopd_collapse",
        "1 while the guard finds the student collapsed, by the rule of eopd/telemetry/guard.py.",
        "0; at 1 go back to a checkpoint from before.",
    ),
    ratio_metric(
        "eopd_source_ratio",
        "Share of the batch's trajectories whose prompts are of a source; of more than 16 sources "
        "none is told.",
        "As prompts.data[].weight says.",
        ("source",),
    ),
    versions_metric(
        "eopd_staleness_mean", "Mean age of the batch when consumed.", "0 when synchronous."
    ),
    versions_metric(
        "eopd_staleness_max", "Oldest token of the batch.", "At most eopd_staleness_bound."
    ),
    versions_metric("eopd_staleness_bound", "flow.max_staleness of the run.", "Constant."),
    ratio_metric(
        "eopd_staleness_ratio",
        "Share of the batch's trajectories that were so many versions old when consumed.",
        "All at 0 when synchronous; none above eopd_staleness_bound.",
        ("versions",),
    ),
    trajectories_metric(
        "eopd_in_flight_trajectories",
        "Trajectories being written or scored when the batch was taken.",
        "0 when synchronous; otherwise 0 means that engines idle while the learner trains.",
    ),
    trajectories_metric(
        "eopd_ready_trajectories",
        "Scored trajectories in the buffer that wait for the learner.",
        "About a batch when asynchronous; 0 means that the learner is the one who waits.",
    ),
    Metric(
        "gauge",
        "tokens per second",
        "eopd_response_tokens_per_second",
        "Response tokens of the batch over the seconds of the step.",
        "Steady.",
    ),
    Metric(
        "counter",
        "tokens",
        "eopd_response_tokens_total",
        f"Response tokens trained on. {ROLLED_BACK}",
        "Grows.",
    ),
    Metric(
        "counter",
        "trajectories",
        "eopd_trajectories_total",
        f"Trajectories trained on. {ROLLED_BACK}",
        "Grows.",
    ),
    Metric(
        "counter",
        "trajectories",
        "eopd_lost_trajectories_total",
        "Trajectories lost and issued again.",
        "Flat; a few after a node was lost.",
        ("reason",),
    ),
    Metric(
        "counter",
        "trajectories",
        "eopd_dropped_trajectories_total",
        "Trajectories given up after flow.max_attempts attempts; dropped.jsonl names them. "
        f"{ROLLED_BACK}",
        "0; more than flow.max_dropped_ratio of a run ends it.",
    ),
    Metric(
        "counter",
        "trajectories",
        "eopd_filtered_trajectories_total",
        f"Trajectories that flow.filter dropped; dropped.jsonl names them. {ROLLED_BACK}",
        "0 without a filter; else it grows with the share that the filter is meant to drop.",
    ),
)

_TEACHERS: Final = (
    Metric(
        "counter",
        "tokens",
        "eopd_teacher_tokens_total",
        f"Response tokens scored, held-out ones too. {OF_PROCESS}",
        "Grows.",
        ("teacher",),
    ),
    Metric(
        "counter",
        "trajectories",
        "eopd_teacher_failures_total",
        "Trajectories that a replica did not answer, because it was lost or too slow. "
        + OF_PROCESS,
        "Flat.",
        ("teacher",),
    ),
    counter_metric(
        "eopd_teacher_replacements_total",
        f"Replicas started in the place of one that was lost. {OF_PROCESS}",
        "Flat.",
        ("teacher",),
    ),
    number_metric(
        "eopd_teacher_replicas_up", "Replicas that take work.", "All of them.", ("teacher",)
    ),
    trajectories_metric(
        "eopd_teacher_in_flight_trajectories",
        "Trajectories being scored.",
        "Below the batch; steadily high where the teacher is the slowest part.",
        ("teacher",),
    ),
)

_FAULTS: Final = (
    number_metric("eopd_engines_up", "Rollout engines that take work.", "All of them."),
    trajectories_metric(
        "eopd_engine_in_flight_trajectories",
        "Trajectories that a rollout engine is writing.",
        "Equal on all engines; one far above the rest is slow.",
        ("engine",),
    ),
    counter_metric(
        "eopd_engine_failures_total",
        "Trajectories that a rollout engine did not answer, because it was lost or too slow. "
        + OF_PROCESS,
        "Flat.",
    ),
    counter_metric(
        "eopd_engine_replacements_total",
        f"Rollout engines started in the place of lost ones. {OF_PROCESS}",
        "Flat.",
    ),
    counter_metric(
        "eopd_run_seconds_total",
        "Seconds that the run has taken, in all its processes; the time between two of them does not "
        "count.",
        "Rises by a second each second.",
    ),
    counter_metric(
        "eopd_learner_restarts_total",
        "Times all learner ranks were started again from a checkpoint.",
        "Flat.",
    ),
    counter_metric(
        "eopd_config_changes_total",
        "Keys that change what is computed, and versions of packages, changed by --resume so far; "
        "runs/<name>/changes.jsonl has them. " + ROLLED_BACK,
        "0, or what was changed on purpose.",
    ),
    counter_metric(
        "eopd_weight_failures_total",
        f"Weight transfers that failed and were repaired. {OF_PROCESS}",
        "Flat.",
    ),
    bytes_metric("eopd_object_store_bytes", "What the object stores of all nodes hold.", "Flat."),
    bytes_metric("eopd_driver_memory_bytes", "Resident memory of the driver.", "Flat."),
    bytes_metric(
        "eopd_learner_memory_bytes",
        "The most memory a learner rank has held: tensors on its GPU, or its process without one.",
        "Flat after the longest batch; near the device's size, lower learner.token_budget.",
    ),
)

_UPLOADS: Final = (
    Metric(
        "gauge",
        "steps",
        "eopd_uploaded_step",
        "Step of the newest checkpoint that is whole at run.upload.",
        "eopd_checkpoint_step, or the one before it while that is under way.",
    ),
    Metric(
        "counter", "bytes", "eopd_upload_bytes_total", "Bytes uploaded by this process.", "Grows."
    ),
    Metric(
        "counter",
        "seconds",
        "eopd_upload_seconds_total",
        "Seconds in which this process was uploading.",
        "Grows by less than the time that passes.",
    ),
    counter_metric(
        "eopd_upload_failures_total",
        "Attempts to bring run.upload up to date that failed, and were followed by another.",
        "Flat.",
    ),
)

CATALOG: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        *_OBJECTIVE,
        *_DISTRIBUTIONS,
        *_OPTIMISATION,
        *_FLOW,
        *_TEACHERS,
        *_FAULTS,
        *TIME,
        *EVALUATION,
        *STATE,
        *_UPLOADS,
    )
}
