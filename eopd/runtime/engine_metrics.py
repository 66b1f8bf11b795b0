"""VLLM's own metrics of an engine, handed to Ray: its Prometheus endpoint serves them beside Ray's,
as ``ray_vllm_*``.

vLLM has a logger that writes to Ray's metrics (checked against 0.32.0,
``vllm/v1/metrics/ray_wrappers.py``). It imports them together with Ray Serve, which it asks for the
name of a replica, and which is not installed: it is given both. A step of an engine that counts
takes 3 ms longer on two cores: engines do where ``disable_log_stats`` is false alone.
"""

from collections.abc import Sequence

from ray.util import metrics
from vllm.v1.metrics import ray_wrappers
from vllm.v1.metrics.loggers import StatLoggerFactory


def stat_loggers(role: str) -> Sequence[StatLoggerFactory]:
    """What ``AsyncLLM.from_engine_args`` is given in the actor of this ``role``, the metrics'
    label ``ReplicaId``.
    """
    ray_wrappers.ray_metrics = metrics
    ray_wrappers._get_replica_id = lambda: role
    return [ray_wrappers.RayPrometheusStatLogger]
