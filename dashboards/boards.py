"""What the dashboards show, as data: boards of rows of lines of panels. ``build.py`` makes
Grafana's JSON of it.

A panel is a title and the metrics that it draws, all of one unit. The panels of a line share its
width equally; units, descriptions and healthy ranges come from the catalogue, and for what vLLM and
Ray measure from ``others.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from others import OTHERS

from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.metric import Metric, Unit

Kind = Literal["timeseries", "stat"]
METRICS: Final[Mapping[str, Metric]] = {
    **CATALOG,
    **{name: other.metric for name, other in OTHERS.items()},
}


@dataclass(frozen=True, slots=True)
class Panel:
    """``query`` wraps each metric's selector, e.g. ``rate({}[$__rate_interval])``; ``result``
    is its unit then.
    """

    title: str
    metrics: tuple[str, ...]
    kind: Kind = "timeseries"
    stacked: bool = False
    query: str = "{}"
    result: Unit | None = None

    @property
    def unit(self) -> Unit:
        """What the panel is drawn in."""
        (unit,) = {METRICS[name].unit for name in self.metrics}
        return self.result or unit


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. ``rows`` are lines of panels by heading."""

    uid: str
    title: str
    description: str
    rows: dict[str, tuple[tuple[Panel, ...], ...]]


def _one(title: str, *metrics: str) -> Panel:
    return Panel(title, metrics)


def _rate(title: str, metric: str) -> Panel:
    query = "rate({}[$__rate_interval])"
    return Panel(title, (metric,), query=query, result="tokens per second")


def _percentage(title: str, metric: str) -> Panel:
    return Panel(title, (metric,), query="{} / 100")


def _stat(title: str, metric: str) -> Panel:
    query = "sum by (run) ({})" if CATALOG[metric].labels else "{}"
    return Panel(title, (metric,), kind="stat", query=query)


# What a step is made of, one after the other.
STEP: Final = (
    "eopd_wait_rollout_seconds",
    "eopd_wait_teacher_seconds",
    "eopd_train_seconds",
    "eopd_weights_seconds",
)

# What the student can do, measured while it learns.
EVALUATION: Final = (
    (
        _one("Held-out KL", "eopd_eval_reverse_kl_nats", "eopd_eval_forward_kl_nats"),
        _one("Right answers: avg@n", "eopd_eval_avg_at_n_ratio"),
        _one("Right at least once: pass@k", "eopd_eval_pass_at_k_ratio"),
        _one("Different n-grams", "eopd_eval_distinct_ratio"),
    ),
    (
        _one(
            "Held-out entropy", "eopd_eval_student_entropy_nats", "eopd_eval_teacher_entropy_nats"
        ),
        _one("Held-out top-1 agreement", "eopd_eval_top1_agreement_ratio"),
        _one("Length of answers", "eopd_eval_response_tokens_mean"),
        _one("Answers cut", "eopd_eval_truncated_ratio"),
    ),
)

OVERVIEW: Final = Board(
    "eopd-overview",
    "eopd / Overview",
    "Is the run healthy, and where does the time go?",
    {
        "Is it healthy": (
            (
                _one("Step, and the last one", "eopd_step", "eopd_batches"),
                _stat("Last step", "eopd_last_step_timestamp_seconds"),
                _stat("Reverse KL", "eopd_reverse_kl_nats"),
                _stat("Gate open", "eopd_gate_ratio"),
                _stat("Ended by itself", "eopd_end_token_ratio"),
                _stat("Lost trajectories", "eopd_lost_trajectories_total"),
            ),
            (
                _one("Loss", "eopd_loss"),
                _one("KL", "eopd_reverse_kl_nats", "eopd_forward_kl_nats"),
                _one("Entropy", "eopd_teacher_entropy_nats", "eopd_student_entropy_nats"),
            ),
            (
                Panel("What it does", ("eopd_phase",), stacked=True),
                _one("Since when", "eopd_phase_timestamp_seconds"),
                _one("What it is", "eopd_run_info"),
            ),
            (
                _one("Response length", "eopd_response_tokens_mean"),
                _one("How responses end", "eopd_end_token_ratio", "eopd_truncated_ratio"),
                _one("Repetition", "eopd_repetition_ratio"),
                _one("Collapse", "eopd_collapse"),
                Panel("Prompts by source", ("eopd_source_ratio",), stacked=True),
            ),
        ),
        "Evaluation": EVALUATION,
        "Where the time goes": (
            (
                Panel("Learner's step", STEP, stacked=True),
                _one("Step, and the wait in it", "eopd_step_seconds", "eopd_wait_seconds"),
                _one("Response tokens per second", "eopd_response_tokens_per_second"),
            ),
        ),
    },
)

DISTILLATION: Final = Board(
    "eopd-distillation",
    "eopd / Distillation",
    "Does the student come to the teacher, and where does the gate let the forward KL act?",
    {
        "Gate": (
            (
                _one("Gate open", "eopd_gate_ratio"),
                _one("Gate left open by bounds", "eopd_gate_uncertain_ratio"),
                _one(
                    "Teacher entropy, and the gate",
                    "eopd_teacher_entropy_quantile_nats",
                    "eopd_gate_threshold_nats",
                ),
                _one("Entropy", "eopd_teacher_entropy_nats", "eopd_student_entropy_nats"),
            ),
        ),
        "Divergences": (
            (
                _one("Reverse KL", "eopd_reverse_kl_nats"),
                _one("Forward KL", "eopd_forward_kl_nats"),
                _one(
                    "Forward KL by gate",
                    "eopd_forward_kl_gated_nats",
                    "eopd_forward_kl_ungated_nats",
                ),
            ),
            (
                _one(
                    "Mass on the teacher's top k",
                    "eopd_teacher_topk_mass_ratio",
                    "eopd_student_topk_mass_ratio",
                ),
                _one("Top-k overlap", "eopd_topk_overlap_ratio"),
                _one("Reward", "eopd_reward_mean"),
                _one("Rewards missing", "eopd_reward_missing_ratio"),
            ),
        ),
        "Evaluation": EVALUATION,
        "Optimisation": (
            (
                _one("Gradient norm", "eopd_grad_norm"),
                _one("Learning rate", "eopd_learning_rate"),
                _one("Alpha", "eopd_alpha_ratio"),
                _one("Loss tokens", "eopd_loss_tokens"),
            ),
            (
                _one("Importance weight", "eopd_importance_weight_mean"),
                _one(
                    "Capped and clipped tokens",
                    "eopd_importance_capped_ratio",
                    "eopd_clipped_ratio",
                ),
                _one("Log-probability gap", "eopd_logprob_gap_nats"),
            ),
        ),
        "Teachers": (
            (
                _rate("Tokens scored per second", "eopd_teacher_tokens_total"),
                _one("Gate open", "eopd_gate_by_teacher_ratio"),
                _one("Entropy", "eopd_entropy_by_teacher_nats"),
            ),
            (
                _one("In flight", "eopd_teacher_in_flight_trajectories"),
                _one("Replicas that take work", "eopd_teacher_replicas_up"),
                _one("Failures", "eopd_teacher_failures_total"),
            ),
        ),
    },
)

THROUGHPUT: Final = Board(
    "eopd-throughput",
    "eopd / Throughput and staleness",
    "Who is the slowest part, who idles, and how old is what the learner reads?",
    {
        "Throughput": (
            (
                _one("Response tokens per second", "eopd_response_tokens_per_second"),
                _one("Trajectories trained on", "eopd_trajectories_total"),
                _one("Response tokens trained on", "eopd_response_tokens_total"),
            ),
            (
                _one("Busy", "eopd_generate_seconds", "eopd_score_seconds", "eopd_train_seconds"),
                _one(
                    "Wait for engines and teachers",
                    "eopd_wait_rollout_seconds",
                    "eopd_wait_teacher_seconds",
                ),
                _one("Learner rank", "eopd_learner_flops_per_second"),
                _one("Model FLOPs utilisation", "eopd_learner_mfu_ratio"),
            ),
            (
                _one(
                    "Between two steps, and the newest checkpoint",
                    "eopd_between_steps_seconds",
                    "eopd_checkpoint_seconds",
                ),
                _one("Share of a step whose cause is known", "eopd_step_accounted_ratio"),
                _one("Step of the newest checkpoint", "eopd_checkpoint_step"),
                _one("Settings changed by --resume", "eopd_config_changes_total"),
            ),
            (
                _one("Step of the newest uploaded checkpoint", "eopd_uploaded_step"),
                _one("Uploaded", "eopd_upload_bytes_total"),
                _one("Seconds of uploading", "eopd_upload_seconds_total"),
                _one("Uploads that failed", "eopd_upload_failures_total"),
            ),
        ),
        "Evaluation": (
            (
                _one("Weights waited for answers", "eopd_eval_wait_seconds"),
                _one("A measurement took", "eopd_eval_seconds"),
                _one("Step measured last", "eopd_eval_step"),
                _one(
                    "Answers that were lost or not graded",
                    "eopd_eval_lost_trajectories",
                    "eopd_eval_not_graded_trajectories",
                ),
            ),
        ),
        "Who is late": (
            (
                _one("An engine took for a response", "eopd_response_quantile_seconds"),
                _one("A teacher took for a response", "eopd_scoring_quantile_seconds"),
                _one("Length of responses", "eopd_response_tokens_quantile"),
            ),
        ),
        "Queues": (
            (
                _one(
                    "When a batch was taken",
                    "eopd_in_flight_trajectories",
                    "eopd_ready_trajectories",
                ),
                _one("In flight by engine", "eopd_engine_in_flight_trajectories"),
                _one("In flight by teacher", "eopd_teacher_in_flight_trajectories"),
            ),
        ),
        "Staleness": (
            (
                _one(
                    "Age of the batch",
                    "eopd_staleness_mean",
                    "eopd_staleness_max",
                    "eopd_staleness_bound",
                ),
                Panel("Shares by age", ("eopd_staleness_ratio",), stacked=True),
                _one("Log-probability gap", "eopd_logprob_gap_nats"),
            ),
        ),
        "Inside vLLM: engines and teachers of the run": (
            (
                _one(
                    "Requests",
                    "ray_vllm_num_requests_running",
                    "ray_vllm_num_requests_waiting",
                ),
                _one("KV cache", "ray_vllm_kv_cache_usage_perc"),
                _rate("Tokens written per second", "ray_vllm_generation_tokens_total"),
            ),
        ),
        "Served teachers": (
            (
                _one("Requests", "vllm:num_requests_running", "vllm:num_requests_waiting"),
                _one("KV cache", "vllm:kv_cache_usage_perc"),
                _rate("Tokens read per second", "vllm:prompt_tokens_total"),
            ),
        ),
        "Machines, as Ray sees them": (
            (
                _percentage("CPUs", "ray_node_cpu_utilization"),
                _one("Memory", "ray_node_mem_used"),
                _percentage("GPUs", "ray_node_gpus_utilization"),
            ),
        ),
    },
)

FAULTS: Final = Board(
    "eopd-faults",
    "eopd / Weights and faults",
    "Do new weights reach every engine, and who was lost?",
    {
        "Weight sync": (
            (
                _one("Until all engines serve them", "eopd_weights_seconds"),
                _one("Transfer", "eopd_weight_transfer_seconds"),
                _one("Pause", "eopd_weight_pause_seconds"),
            ),
            (
                _one("Engine against learner", "eopd_weight_probe_nats"),
                _one("Failed transfers", "eopd_weight_failures_total"),
                _one("Size", "eopd_weight_bytes"),
            ),
        ),
        "Faults": (
            (
                _one("Engines that take work", "eopd_engines_up", "eopd_engines_wanted"),
                _one(
                    "Teacher replicas that take work",
                    "eopd_teacher_replicas_up",
                    "eopd_teacher_replicas_wanted",
                ),
                _one(
                    "Lost, dropped and filtered trajectories",
                    "eopd_lost_trajectories_total",
                    "eopd_dropped_trajectories_total",
                    "eopd_filtered_trajectories_total",
                ),
                _one("Skipped optimiser steps", "eopd_skipped_steps_total"),
            ),
            (
                _one("Engine failures", "eopd_engine_failures_total"),
                _one("Teacher failures", "eopd_teacher_failures_total"),
                _one(
                    "Replacements",
                    "eopd_engine_replacements_total",
                    "eopd_teacher_replacements_total",
                ),
                _one("Learner restarts", "eopd_learner_restarts_total"),
                _one("Losses that are allowed, used", "eopd_restart_budget_ratio"),
            ),
        ),
        "Disk": (
            (
                _one(
                    "Free, and the newest checkpoint",
                    "eopd_run_free_bytes",
                    "eopd_checkpoint_bytes",
                ),
                _one("Since the newest checkpoint", "eopd_checkpoint_age_seconds"),
                _one("Time of the run, in all its processes", "eopd_run_seconds_total"),
            ),
        ),
        "Memory": (
            (
                _one("Driver", "eopd_driver_memory_bytes"),
                _one("Learner rank, at most", "eopd_learner_memory_bytes"),
                _one("Object stores", "eopd_object_store_bytes"),
            ),
        ),
    },
)

BOARDS: Final = (OVERVIEW, DISTILLATION, THROUGHPUT, FAULTS)
