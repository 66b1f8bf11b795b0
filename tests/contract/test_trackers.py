"""Each tracker, the real package, without a network: what was written is there, under its
name and at its step.
"""

import threading
import time

import pytest

from eopd.config import ConfigError
from eopd.telemetry import trackers
from eopd.telemetry.trackers import BackgroundSink, end, require_trackers, tracker

LOST = 'eopd_lost_trajectories_total{reason="too_stale"}'
SETTINGS = {"run.seed": 0, "teachers.0.name": "big"}


def row(step: int) -> dict[str, float]:
    return {
        "eopd_step": step,
        "eopd_loss": 1.0 / step,
        LOST: 2.0 * step,
        "eopd_grad_norm": float("nan"),
    }


def write(name, directory, *steps: int, status="completed") -> None:
    sink = tracker(name, directory, "my-run", SETTINGS)
    for step in steps:
        sink.write(row(step))

    end([sink], status)


def test_tensorboard_holds_every_number_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path, 1, 2)
    write("tensorboard", tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"eopd_step", "eopd_loss", "eopd_lost_trajectories_total/too_stale"}
    assert set(events.Tags()["tensors"]) == names
    steps = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("eopd_loss")]
    assert steps == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server's stand-in
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    client = MlflowClient()
    for status, shown in (("interrupted", "KILLED"), ("failed", "FAILED")):
        write("mlflow", tmp_path, 1 if status == "interrupted" else 2, status=status)
        assert client.get_run((tmp_path / "mlflow" / "run-id").read_text()).info.status == shown

    write("mlflow", tmp_path, 3)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.data.params == {"run.seed": "0", "teachers.0.name": "big"}
    history = client.get_metric_history(run.info.run_id, "eopd_lost_trajectories_total/too_stale")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert "eopd_grad_norm" not in run.data.metrics


def test_weights_and_biases_keeps_a_run_to_be_synced(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write("wandb", tmp_path, 1, 2)
    write("wandb", tmp_path, 3)
    first, second = sorted((tmp_path / "wandb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{(tmp_path / 'wandb' / 'run-id').read_text()}.wandb"
    for name in (b"eopd_lost_trajectories_total/too_stale", b"my-run", b"teachers.0.name"):
        assert name in first.read_bytes()


def test_what_cannot_be_used_is_one_message(monkeypatch):
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else object()
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    require_trackers(["mlflow", "tensorboard"])

    with pytest.raises(
        ConfigError,
        match=r"telemetry.trackers: wandb is not installed; pip install 'eopd\[wandb\]'",
    ):
        require_trackers(["mlflow", "wandb"])

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="mlflow needs a server: set MLFLOW_TRACKING_URI"):
        require_trackers(["mlflow"])


class Slow:
    """A service that does not answer until it is let."""

    def __init__(self) -> None:
        self.may_answer, self.rows, self.status = threading.Event(), [], None

    def write(self, row):
        self.may_answer.wait()
        self.rows.append(row)

    def end(self, status):
        self.status = status


def test_a_service_that_does_not_answer_holds_nobody_up_and_has_every_row_once_it_does(caplog):
    slow = Slow()
    sink = BackgroundSink("slow", lambda: slow)
    rows = [{"eopd_step": float(step)} for step in range(1, 11)]
    started = time.monotonic()
    for row in rows:
        sink.write(row)

    assert time.monotonic() - started < 1.0
    slow.may_answer.set()
    end([sink], "interrupted")
    assert slow.status == "interrupted" and slow.rows == rows and not caplog.records


def test_a_service_that_is_away_for_days_costs_no_more_memory_than_its_queue(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "QUEUE_ROWS", 3)
    slow = Slow()
    sink = BackgroundSink("slow", lambda: slow)
    for step in range(1, 11):
        sink.write({"eopd_step": float(step)})

    slow.may_answer.set()
    end([sink], "interrupted")
    assert slow.status == "interrupted" and 3 <= len(slow.rows) <= 4
    messages = [record.message for record in caplog.records]
    assert messages == ["slow is behind by 3 steps: later ones are missing there"]


def test_an_end_that_takes_too_long_is_given_up_for_all_together_and_said(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "END_S", 0.3)
    slow = Slow()
    sinks = [BackgroundSink(name, lambda: slow) for name in ("first", "second")]
    for sink in sinks:
        sink.write({"eopd_step": 1.0})

    started = time.monotonic()
    end(sinks, "completed")
    assert 0.3 <= time.monotonic() - started < 0.6
    slow.may_answer.set()
    for name in ("first", "second"):
        assert f"{name} did not take all steps within 0.3 s" in caplog.text


@pytest.mark.parametrize("where", ["start", "write"])
def test_a_tracker_that_fails_is_reported_once(where, caplog):
    class Broken:
        def write(self, row):
            raise OSError("no such host")

        def end(self, status):
            pass

    def make():
        if where == "start":
            raise OSError("no such host")

        return Broken()

    sink = BackgroundSink("broken", make)
    for step in (1.0, 2.0):
        sink.write({"eopd_step": step})

    end([sink], "completed")
    assert [record.levelname for record in caplog.records if record.levelno >= 30] == ["WARNING"]
    assert "no such host" in caplog.text
