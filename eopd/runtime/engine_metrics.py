"""VLLM's own metrics of an engine are handed to Ray, whose Prometheus endpoint serves them as
``ray_vllm_*``.

vLLM has a logger that writes to Ray's metrics (checked against 0.32.0,
``vllm/v1/metrics/ray_wrappers.py``). It imports them together with Ray Serve, which is not
installed, and asks that for the name of a replica: both are set here. Counting makes a step of an
engine 3 ms longer on two cores, so only engines with ``disable_log_stats: false`` count.
"""

from collections.abc import Sequence

from ray.util import metrics
from vllm.v1.metrics import ray_wrappers
from vllm.v1.metrics.loggers import StatLoggerFactory


def stat_loggers(role: str) -> Sequence[StatLoggerFactory]:
    """Returns the loggers for ``AsyncLLM.from_engine_args``; ``role`` is the metrics' label
    ``ReplicaId``.
    """
    ray_wrappers.ray_metrics = metrics
    ray_wrappers._get_replica_id = lambda: role
    return [ray_wrappers.RayPrometheusStatLogger]
