"""Where a run shows what it does: every outlet has its row, and Prometheus sees more than rows."""

import json
import re
import signal
import threading
import time
import urllib.request
from contextlib import ExitStack

import fakes
import pytest

from eopd.config import load_config
from eopd.run.directory import RunDirectory
from eopd.runtime.outlets import Outlets, monitored, open_trackers, show_end

ROW = {"eopd_step": 1.0, "eopd_loss": 0.5}


@pytest.fixture
def open_outlets(tmp_path):
    path = fakes.write_config(tmp_path)
    with ExitStack() as stack:

        def make(*overrides):
            config = load_config(path, overrides)
            directory = RunDirectory.create(config)
            endpoint = stack.enter_context(monitored(config))
            outlets = Outlets(config, directory, open_trackers(config, directory), endpoint)
            stack.callback(outlets.close)
            return outlets, directory

        yield make


def scrape(address):
    return urllib.request.urlopen(address, timeout=10).read().decode()


def phase_of(metrics):
    """What the run does, by the one series that is 1."""
    (phase,) = re.findall(r'eopd_phase\{phase="(\w+)",run="r"\} 1\.0', metrics)
    return phase


def test_prometheus_sees_who_is_up_while_no_step_ends(open_outlets):
    outlets, directory = open_outlets("telemetry.port=0")
    address = re.search(r"http://\S+", outlets.notes[0])[0]
    outlets.write(ROW)
    outlets.show_state({"eopd_engines_up": 1.0})

    metrics = scrape(address)
    assert 'eopd_loss{run="r"} 0.5' in metrics
    assert 'eopd_engines_up{run="r"} 1.0' in metrics
    (row,) = fakes.read_rows(directory.metrics)
    assert "eopd_engines_up" not in row


def test_a_terminal_that_cannot_be_closed_ends_no_run(open_outlets, monkeypatch, caplog):
    outlets, _ = open_outlets()

    def fails(console):
        raise OSError("gone")

    monkeypatch.setattr(type(outlets._console), "close", fails)
    outlets.close()
    assert "the terminal failed" in caplog.text


def test_without_a_port_there_is_nothing_to_scrape(open_outlets):
    outlets, directory = open_outlets("telemetry.port=null")
    outlets.show_state({"eopd_engines_up": 1.0})
    outlets.write(ROW)
    assert outlets.notes == []
    (row,) = fakes.read_rows(directory.metrics)
    assert row["eopd_loss"] == 0.5


def test_a_message_is_printed_and_logged(open_outlets, capsys, caplog):
    caplog.set_level("INFO", "eopd")
    outlets, _ = open_outlets("telemetry.port=null")
    outlets.say("the learner was lost [1]")
    assert "the learner was lost [1]" in capsys.readouterr().out
    assert "the learner was lost [1]" in caplog.text


def test_prometheus_sees_what_the_run_does_and_since_when(open_outlets):
    outlets, directory = open_outlets("telemetry.port=0")
    address = re.search(r"http://\S+", outlets.notes[0])[0]
    assert phase_of(scrape(address)) == "starting"

    with outlets.phase("training"):
        assert phase_of(scrape(address)) == "training"
        before = time.time()
        with outlets.phase("saving"):
            metrics = scrape(address)
            assert phase_of(metrics) == "saving"
            (since,) = re.findall(r'eopd_phase_timestamp_seconds\{run="r"\} (\S+)', metrics)
            assert before <= float(since) <= time.time()

        assert phase_of(scrape(address)) == "training"

    outlets.write(ROW)
    (row,) = fakes.read_rows(directory.metrics)
    assert not any("phase" in key or "info" in key for key in row)


def test_prometheus_sees_what_runs_and_only_the_newest_incarnation(open_outlets):
    outlets, _ = open_outlets("telemetry.port=0", "student.model=/some/where/student")
    address = re.search(r"http://\S+", outlets.notes[0])[0]
    outlets.show_incarnation(0)
    outlets.show_incarnation(1)
    outlets.write(ROW)
    (info,) = re.findall(r"^eopd_run_info\{(.+)\} 1\.0$", scrape(address), re.M)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
    assert labels["incarnation"] == "1"
    assert labels["student"] == "student"
    assert re.fullmatch("[0-9a-f]{12}", labels["config"])
    assert set(labels) == {
        *("version", "commit", "incarnation", "student", "teachers", "config", "node", "run")
    }


def test_a_run_is_announced_while_it_runs(tmp_path):
    path = fakes.write_config(tmp_path)
    config = load_config(path, ["telemetry.port=0", f"telemetry.discovery={tmp_path}/targets"])
    with monitored(config) as endpoint:
        (file,) = (tmp_path / "targets").glob("*.json")
        (target,) = json.loads(file.read_text())
        assert target["targets"] == [endpoint.address]
        assert target["labels"]["run"] == "r"

    assert not list((tmp_path / "targets").iterdir())


def test_a_run_that_ended_shows_it_until_it_was_scraped_once_more(tmp_path):
    config = load_config(fakes.write_config(tmp_path), ["telemetry.port=0"])
    with monitored(config) as endpoint:
        address = f"http://{endpoint.address}/metrics"
        scrape(address)
        time.sleep(0.5)
        scrape(address)
        seen = []
        late = threading.Timer(0.4, lambda: seen.append(scrape(address)))
        late.start()
        show_end(endpoint)
        late.join()
        assert phase_of(seen[0]) == "ended"


def test_ctrl_c_ends_the_wait_for_the_last_scrape_alone(tmp_path):
    config = load_config(fakes.write_config(tmp_path), ["telemetry.port=0"])
    with monitored(config) as endpoint:
        scrape(f"http://{endpoint.address}/metrics")
        time.sleep(2.0)
        scrape(f"http://{endpoint.address}/metrics")
        pressed = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        started = time.monotonic()
        pressed.start()
        show_end(endpoint)
        assert time.monotonic() - started < 2.0


def test_nobody_waits_for_a_scrape_that_does_not_come(tmp_path):
    config = load_config(fakes.write_config(tmp_path), ["telemetry.port=0"])
    started = time.monotonic()
    with monitored(config) as endpoint:
        show_end(endpoint)  # nobody scrapes at all
        scrape(f"http://{endpoint.address}/metrics")
        show_end(endpoint)  # a person has looked once
        time.sleep(0.2)
        scrape(f"http://{endpoint.address}/metrics")
        show_end(endpoint)  # twice, and no more

    assert time.monotonic() - started < 5.0
