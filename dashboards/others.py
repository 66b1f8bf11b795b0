"""What vLLM and Ray measure themselves and the dashboards show beside the catalogue: the engines of a
run (``ray_vllm_*``, where ``disable_log_stats: false``), served teachers (``vllm:*``) and machines.

Their labels are theirs. None has the label ``run``: Ray serves all that runs on its nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eopd.telemetry.metric import Metric, bytes_metric, number_metric, ratio_metric

NEEDS_STATS: Final = "Only of engines with vllm: {disable_log_stats: false}."


@dataclass(frozen=True, slots=True)
class Other:
    """A metric of another program: which of its series are drawn, and how."""

    metric: Metric
    selector: str = ""


def _of_engine(name: str, meaning: str, healthy: str) -> Other:
    metric = number_metric(f"ray_vllm_{name}", f"{meaning} {NEEDS_STATS}", healthy, ("ReplicaId",))
    return Other(metric, '{ReplicaId!=""}')


def _of_teacher(name: str, meaning: str, healthy: str) -> Other:
    return Other(number_metric(f"vllm:{name}", meaning, healthy, ("teacher",)), '{teacher!=""}')


_ALL: Final = (
    _of_engine(
        "num_requests_running",
        "Requests that vLLM computes at the same time.",
        "As many as fit into its KV cache; a few mean that it waits for work.",
    ),
    _of_engine(
        "num_requests_waiting",
        "Requests that wait in vLLM.",
        "0 or few; the run itself keeps the rest.",
    ),
    _of_engine(
        "kv_cache_usage_perc",
        "Share of the KV cache that is taken.",
        "Below 1; at 1 requests are put off and begun again.",
    ),
    _of_engine("generation_tokens_total", "Tokens written.", "Steady."),
    _of_teacher(
        "num_requests_running",
        "Requests that a served teacher reads at the same time.",
        "Below its limit; at the limit more replicas help.",
    ),
    _of_teacher("num_requests_waiting", "Requests that wait in a served teacher.", "0 or few."),
    _of_teacher(
        "kv_cache_usage_perc", "Share of a served teacher's KV cache that is taken.", "Below 1."
    ),
    _of_teacher("prompt_tokens_total", "Tokens that a served teacher has read.", "Steady."),
    Other(
        ratio_metric("ray_node_cpu_utilization", "CPUs of a machine in use.", "Below 1.", ("ip",))
    ),
    Other(bytes_metric("ray_node_mem_used", "Memory of a machine in use.", "Steady.", ("ip",))),
    Other(
        ratio_metric(
            "ray_node_gpus_utilization",
            "A GPU in use.",
            "Near 1 on engines and teachers while they have work.",
            ("ip", "GpuIndex"),
        )
    ),
)
OTHERS: Final[Mapping[str, Other]] = {other.metric.name: other for other in _ALL}
