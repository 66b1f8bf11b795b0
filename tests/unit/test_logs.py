"""Lines of every process of a run in one place, each with its role."""

import json
import logging
import re

import pytest

from eopd.runtime import logs as module
from eopd.runtime.logs import collect, dispatcher, logger


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(module, "LAG_S", 0.0)


def batch(name: str, *lines: str) -> dict[str, object]:
    return {
        "ip": "10.0.0.7",
        "pid": "41",
        "actor_name": name,
        "is_err": True,
        "job": "01",
        "lines": list(lines),
    }


def test_every_actor_has_a_file_and_every_line_its_role(tmp_path):
    with collect(tmp_path / "logs", "text"):
        dispatcher.emit(batch("rollout-0", "one", "two \u2028 three"))
        dispatcher.emit(batch("rollout-1", "other", "0%\r100%"))
        dispatcher.emit(batch("", "what Ray's own processes say"))
        dispatcher.emit(batch("rollout-0", "again"))
        logger.info("from the driver\n  in two lines")
        logging.getLogger("eopd.telemetry").warning("a sink failed")

    dispatcher.emit(batch("rollout-0", "too late"))
    logger.warning("too late")
    found = {}
    for path in (tmp_path / "logs").iterdir():
        found[path.name] = []
        for line in path.read_text().split("\n")[:-1]:
            time, text = line.split(" ", 1)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", time)
            found[path.name].append(text)

    assert found == {
        "rollout-0.log": [
            "rollout-0 one",
            "rollout-0 two \u2028 three",
            "rollout-0 again",
        ],
        "rollout-1.log": [
            "rollout-1 other",
            "rollout-1 0%",
            "rollout-1 100%",
        ],
        "driver.log": [
            "driver from the driver",
            "driver   in two lines",
            "driver a sink failed",
        ],
    }


def test_lines_may_be_json_objects(tmp_path):
    with collect(tmp_path / "logs", "json"):
        dispatcher.emit(batch("teacher-a-0", 'it said "no"'))

    (record,) = map(json.loads, (tmp_path / "logs" / "teacher-a-0.log").read_text().splitlines())
    assert record.pop("time")
    assert record == {
        "role": "teacher-a-0",
        "node": "10.0.0.7",
        "pid": 41,
        "text": 'it said "no"',
    }


def test_a_disk_that_takes_nothing_costs_the_lines_and_not_the_run(tmp_path):
    with collect(tmp_path / "logs", "text"):
        (tmp_path / "logs" / "rollout-0.log").mkdir()
        dispatcher.emit(batch("rollout-0", "lost"))
        dispatcher.emit(batch("rollout-1", "kept"))

    assert (tmp_path / "logs" / "rollout-1.log").read_text().endswith(" rollout-1 kept\n")


def test_blank_lines_between_progress_bars_are_left_out(tmp_path):
    with collect(tmp_path / "logs", "text"):
        dispatcher.emit(
            batch(
                "rollout-0",
                "",
                "\rloading:  0%",
                "  ",
                "\rloading: 100%\n",
            )
        )

    lines = (tmp_path / "logs" / "rollout-0.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["loading:  0%", "loading: 100%"]


def test_a_full_file_makes_room_and_its_newest_lines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FULL_BYTES", 100)
    with collect(tmp_path / "logs", "text"):
        for number in range(8):
            dispatcher.emit(batch("rollout-0", f"line {number}"))

    kept = {path.name: path.read_text().splitlines() for path in (tmp_path / "logs").iterdir()}
    assert [line[-1] for line in kept["rollout-0.log.1"]] == ["3", "4", "5"]
    assert [line[-1] for line in kept["rollout-0.log"]] == ["6", "7"]
    assert len(kept) == 2
