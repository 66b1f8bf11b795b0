"""Rows for the services where people keep their runs: TensorBoard, Weights & Biases, MLflow; each
is an optional extra.

    Telemetry --row--> BackgroundSink --queue--> its thread --row--> Tracker

Training never waits for a tracker. A tracker imports for seconds, and ``wandb.init`` and
``finish`` and every call of MLflow wait for a server for minutes: each lives in a thread of its
own. The thread is a daemon, unlike those of ``concurrent.futures``, so that a tracker that hangs
does not keep the process.

Where the rows go, and with which key, is said by the tracker's own environment variables
(``WANDB_PROJECT``, ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ...). A run that is continued goes on
in the same run there. Numbers that are not finite are left out.
"""

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
from typing import Final, Literal, Protocol, TypeVar

from eopd.config import ConfigError, TrackerName
from eopd.run.record import RUN_ID, Row
from eopd.telemetry.series import parse_series

Status = Literal["completed", "interrupted", "failed", "collapsed"]
END_S: Final = 60.0
QUEUE_ROWS: Final = 10_000
T = TypeVar("T")
logger = logging.getLogger(__name__)


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raise unless all trackers can be used.

    Raises:
        ConfigError: one is not installed, or MLflow has no server.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"telemetry.trackers: {name} is not installed; pip install 'eopd[{name}]'"
            )

    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError("telemetry.trackers: mlflow needs a server: set MLFLOW_TRACKING_URI")


class Tracker(Protocol):
    """A service that takes rows from its construction until ``end``."""

    def write(self, row: Row) -> None:
        """Take the row of one completed step."""

    def end(self, status: Status) -> None:
        """Pass on how the run ended, and close the connection."""


def tracker(
    name: TrackerName, directory: Path, run: str, settings: Mapping[str, object]
) -> "BackgroundSink":
    """Returns the sink of a tracker, which starts in the background.

    Args:
        name: which one.
        directory: the run directory; the tracker keeps what it keeps here in ``directory/name``.
        run: the name of the run.
        settings: the config, flat, shown beside the curves.
    """
    kinds: Mapping[TrackerName, Callable[[Path, str, Mapping[str, object]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WeightsAndBiases,
        "mlflow": _MLflow,
    }
    return BackgroundSink(name, lambda: kinds[name](directory / name, run, settings))


def end(trackers: Sequence["BackgroundSink"], status: Status) -> None:
    """Tell all trackers how the run ended, and give them together ``END_S`` for what is queued."""
    deadline = time.monotonic() + END_S
    for sink in trackers:
        sink.end(status)

    for sink in trackers:
        sink.join(deadline)


class BackgroundSink:
    """A sink that hands rows to a tracker, which is made, written to and ended in a thread of its
    own. A failure is logged once. How the run ended is known later, once its own files are whole.

    Rows wait until the tracker takes them: ``QUEUE_ROWS``, 100 MB of a run with a hundred series.
    Those beyond are missing there, which is logged.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[Row | Status] = queue.SimpleQueue()
        self._said: set[str] = set()
        self._thread = threading.Thread(
            target=self._run, args=(make,), name=f"tracker-{name}", daemon=True
        )
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queue a row for a tracker that can be used; never blocks."""
        if not self._thread.is_alive():
            return

        if self._queue.qsize() < QUEUE_ROWS:
            self._queue.put(row)
        else:
            self._say(f"is behind by {QUEUE_ROWS} steps: later ones are missing there")

    def end(self, status: Status) -> None:
        """Queues how the run ended, after its last row."""
        self._queue.put(status)

    def join(self, deadline: float) -> None:
        """Waits for the tracker to take what is queued, until ``deadline`` (of the monotonic clock)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"did not take all steps within {END_S:g} s: some are missing there")

    def _run(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except Exception:  # noqa: BLE001 - said, whatever it is; the run goes on
            self._say("cannot be used: this run will be missing there", exc_info=True)
            return

        while not isinstance(item := self._queue.get(), str):
            self._try(tracker.write, item)

        self._try(tracker.end, item)

    def _try(self, method: Callable[[T], None], item: T) -> None:
        try:
            method(item)
        except Exception:  # noqa: BLE001 - likewise
            self._say("failed: steps may be missing there", exc_info=True)

    def _say(self, text: str, *, exc_info: bool = False) -> None:
        if text not in self._said:
            logger.warning("%s %s", self.name, text, exc_info=exc_info)

        self._said.add(text)


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

    def end(self, status: Status) -> None:
        del status
        self._writer.close()


class _WeightsAndBiases:
    """A run of the project ``eopd``, unless ``WANDB_PROJECT`` names another. The x axis is the
    step, also of a step that was done again.
    """

    def __init__(self, directory: Path, run: str, settings: Mapping[str, object]) -> None:
        import wandb

        directory.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "eopd"),
            name=run,
            id=_kept(directory / RUN_ID, lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(directory),
            config=dict(settings),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="eopd_step")

    def write(self, row: Row) -> None:
        self._run.log(dict(_numbers(row)))

    def end(self, status: Status) -> None:
        self._run.finish(exit_code=int(status in ("failed", "collapsed")))


class _MLflow:
    """A run of the experiment ``eopd``, unless ``MLFLOW_EXPERIMENT_NAME`` names another."""

    def __init__(self, directory: Path, run: str, settings: Mapping[str, object]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        directory.mkdir(exist_ok=True)
        self._metric = Metric
        self._client = client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        self._run_id = _kept(directory / RUN_ID, lambda: self._create(run))
        logged = client.get_run(self._run_id).data.params
        new = [Param(key, str(value)[:500]) for key, value in settings.items() if key not in logged]
        client.log_batch(self._run_id, params=new)
        client.update_run(self._run_id, status="RUNNING")

    def _create(self, run: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "eopd")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return str(self._client.create_run(number, run_name=run).info.run_id)

    def write(self, row: Row) -> None:
        now, step = int(1000 * time.time()), int(row["eopd_step"])
        self._client.log_batch(
            self._run_id, [self._metric(name, value, now, step) for name, value in _numbers(row)]
        )

    def end(self, status: Status) -> None:
        ends: Mapping[Status, str] = {
            "completed": "FINISHED",
            "interrupted": "KILLED",
            "failed": "FAILED",
            "collapsed": "FAILED",
        }
        self._client.set_terminated(self._run_id, ends[status])


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    """Yields the finite numbers of a row, under names that all three take, such as
    ``eopd_lost_trajectories_total/too_stale``.
    """
    for series, value in row.items():
        if math.isfinite(value):
            metric, labels = parse_series(series)
            yield "/".join([metric.name, *labels.values()]), float(value)


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Returns what a file holds; it is written with what ``make`` returns the first time."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")

    return path.read_text(encoding="utf-8")
