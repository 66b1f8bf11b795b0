"""Where a run shows what it does: every outlet has its row, and Prometheus sees more than rows."""

import re
import urllib.request

import fakes
import pytest

from eopd.config import load_config
from eopd.run.directory import RunDirectory
from eopd.runtime.outlets import Outlets, open_trackers

ROW = {"eopd_step": 1.0, "eopd_loss": 0.5}


@pytest.fixture
def open_outlets(tmp_path):
    path = fakes.write_config(tmp_path)
    opened = []

    def make(*overrides):
        config = load_config(path, overrides)
        directory = RunDirectory.create(config)
        opened.append(Outlets(config, directory, open_trackers(config, directory)))
        return opened[-1], directory

    yield make
    for outlets in opened:
        outlets.close()


def test_prometheus_sees_who_is_up_while_no_step_ends(open_outlets):
    outlets, directory = open_outlets("telemetry.port=0")
    address = re.search(r"http://\S+", outlets.notes[0])[0]
    outlets.write(ROW)
    outlets.show_state({"eopd_engines_up": 1.0})

    metrics = urllib.request.urlopen(address).read().decode()
    assert 'eopd_loss{run="r"} 0.5' in metrics
    assert 'eopd_engines_up{run="r"} 1.0' in metrics
    (row,) = fakes.read_rows(directory.metrics)
    assert "eopd_engines_up" not in row


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
