"""Rows for the services where people keep their runs: TensorBoard, Weights & Biases, MLflow; each is an optional extra.

    Telemetry --row--> BackgroundSink --queue--> its thread --row--> one tracker

A tracker may import for seconds and wait for a network for minutes: it lives in a thread of its own, and training never
waits for it. Where it goes, and with which key, its own environment variables say (``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ...). A run that is continued goes on in the same run there. Numbers that are not finite are
left out.
"""

import contextlib
import importlib.util
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from eopd.config import ConfigError, TrackerName
from eopd.telemetry.catalog import Row
from eopd.telemetry.rows import parse_series
from eopd.telemetry.sinks import Sink, Telemetry

QUEUE_ROWS: Final = 1000
CLOSE_S: Final = 60.0
logger = logging.getLogger(__name__)


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ConfigError where one is not installed, or MLflow has no server."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"telemetry.trackers: {name} is not installed; pip install 'eopd[{name}]'")
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError("telemetry.trackers: mlflow needs a server: set MLFLOW_TRACKING_URI")


def tracker(name: TrackerName, directory: Path, run: str, settings: Mapping[str, object]) -> Sink:
    """The sink of a tracker, which starts in the background.

    Args:
        name: which one.
        directory: the run directory; the tracker keeps what it keeps here in ``directory/name``.
        run: the name of the run.
        settings: the config, flat, shown beside the curves.
    """
    kinds: Mapping[TrackerName, Callable[[Path, str, Mapping[str, object]], Sink]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WeightsAndBiases,
        "mlflow": _MLflow,
    }
    return BackgroundSink(name, lambda: kinds[name](directory / name, run, settings))


class BackgroundSink:
    """Hands rows to a sink that is made, written to and closed in a thread of its own, whatever it takes.

    Up to ``QUEUE_ROWS`` rows wait for it. Beyond that they are dropped, which is said once.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queue a row; never blocks."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("%s is behind by %d steps: later ones are missing there", self._name, QUEUE_ROWS)

    def close(self) -> None:
        """Give what is queued up to ``CLOSE_S`` to get there."""
        deadline = time.monotonic() + CLOSE_S
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_S)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s did not take all steps within %g s: some are missing there", self._name, CLOSE_S)

    def _run(self, make: Callable[[], Sink]) -> None:
        try:
            sinks = [make()]
        except Exception:
            logger.warning("%s cannot be used: this run will be missing there", self._name, exc_info=True)
            sinks = []
        telemetry = Telemetry(sinks)
        for row in iter(self._rows.get, None):
            telemetry.write(row)
        telemetry.close()


class _TensorBoard:
    """Event files in the run directory: ``tensorboard --logdir runs``."""

    def __init__(self, directory: Path, run: str, settings: Mapping[str, object]) -> None:
        from tensorboard.summary import Writer

        del run, settings  # the directory has both
        self._writer = Writer(str(directory))

    def write(self, row: Row) -> None:
        for name, value in _numbers(row):
            self._writer.add_scalar(name, value, int(row["eopd_step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of the project ``eopd``, unless ``WANDB_PROJECT`` names another; x is the step, also of one done again."""

    def __init__(self, directory: Path, run: str, settings: Mapping[str, object]) -> None:
        import wandb

        directory.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "eopd"),
            name=run,
            id=_kept(directory / "run-id", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(directory),
            config=dict(settings),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="eopd_step")

    def write(self, row: Row) -> None:
        self._run.log(dict(_numbers(row)))

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of the experiment ``eopd``, unless ``MLFLOW_EXPERIMENT_NAME`` names another."""

    def __init__(self, directory: Path, run: str, settings: Mapping[str, object]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        directory.mkdir(exist_ok=True)
        self._metric = Metric
        self._client = client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        self._run_id = _kept(directory / "run-id", lambda: self._create(run))
        known = client.get_run(self._run_id).data.params
        new = [Param(key, str(value)[:500]) for key, value in settings.items() if key not in known]
        client.log_batch(self._run_id, params=new)
        client.update_run(self._run_id, status="RUNNING")

    def _create(self, run: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "eopd")
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        return str(self._client.create_run(experiment, run_name=run).info.run_id)

    def write(self, row: Row) -> None:
        now, step = int(1000 * time.time()), int(row["eopd_step"])
        self._client.log_batch(self._run_id, [self._metric(name, value, now, step) for name, value in _numbers(row)])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    """Names as all three take them, ``eopd_lost_trajectories_total/too_stale``, with what is finite."""
    for series, value in row.items():
        if math.isfinite(value):
            metric, labels = parse_series(series)
            yield "/".join([metric.name, *labels.values()]), float(value)


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What was made the first time."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")
