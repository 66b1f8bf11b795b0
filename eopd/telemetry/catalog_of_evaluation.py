"""The metrics of evaluation, a part of the catalogue."""

from typing import Final

from eopd.telemetry.metric import (
    Metric,
    nats_metric,
    ratio_metric,
    seconds_metric,
    trajectories_metric,
)

EVALUATION: Final = (
    Metric(
        "gauge",
        "steps",
        "eopd_eval_step",
        "Step whose weights were measured last: held_out, or a benchmark.",
        "At most evaluation.every below eopd_step.",
        ("evaluation",),
    ),
    seconds_metric(
        "eopd_eval_seconds",
        "Time of the newest measurement. The learner waits for held_out, and for no benchmark.",
        "Steady.",
        ("evaluation",),
    ),
    seconds_metric(
        "eopd_eval_wait_seconds",
        "The part of eopd_weights_seconds in which the weights waited for a benchmark's last "
        "answer.",
        "0, but for the step after an evaluation; then below the time of a step.",
    ),
    nats_metric(
        "eopd_eval_reverse_kl_nats",
        "Reverse KL on the held-out prompts, when measured last.",
        "Falls; the step where it begins to rise is the last good one.",
    ),
    nats_metric(
        "eopd_eval_forward_kl_nats",
        "Forward KL on the held-out prompts, when measured last.",
        "Falls.",
    ),
    nats_metric(
        "eopd_eval_student_entropy_nats",
        "Student entropy on the held-out prompts, when measured last.",
        "Comes to the teacher's.",
    ),
    nats_metric(
        "eopd_eval_teacher_entropy_nats",
        "Teacher entropy on the held-out prompts, when measured last.",
        "Steady.",
    ),
    ratio_metric(
        "eopd_eval_top1_agreement_ratio",
        "Share of held-out positions where student and teacher find the same token most likely.",
        "Rises.",
    ),
    ratio_metric(
        "eopd_eval_avg_at_n_ratio",
        "Share of a benchmark's responses that are right, a mean over its prompts.",
        "Rises, then levels off.",
        ("benchmark",),
    ),
    ratio_metric(
        "eopd_eval_pass_at_k_ratio",
        "Probability that one of k responses is right, a mean over a benchmark's prompts; k is 2, 4, "
        "8 and so on below its samples, and their number.",
        "Rises, or stays while avg@n rises; a fall is lost diversity.",
        ("benchmark", "k"),
    ),
    Metric(
        "gauge",
        "tokens",
        "eopd_eval_response_tokens_mean",
        "Mean length of a benchmark's responses.",
        "Steady; a climb to the limit is the length run-away.",
        ("benchmark",),
    ),
    ratio_metric(
        "eopd_eval_truncated_ratio",
        "Share of a benchmark's responses cut by the length limit.",
        "Low; a rise is collapse.",
        ("benchmark",),
    ),
    ratio_metric(
        "eopd_eval_distinct_ratio",
        "Distinct-n: different n-grams of tokens over all, of the responses to one prompt.",
        "Steady; a fall is repetition, or responses that become one another's copies.",
        ("benchmark", "n"),
    ),
    trajectories_metric(
        "eopd_eval_lost_trajectories",
        "Responses of a benchmark that were lost, and count as wrong.",
        "0; a few where an engine was replaced.",
        ("benchmark",),
    ),
    trajectories_metric(
        "eopd_eval_not_graded_trajectories",
        "Responses of a benchmark whose grader failed or took too long; they count as wrong.",
        "0; more than a few are a fault of the grader.",
        ("benchmark",),
    ),
)
