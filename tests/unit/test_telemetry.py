"""Rows: what the catalogue lets pass, and how they reach files and a real HTTP endpoint."""

import json
import logging
import math
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from eopd.config import ConfigError, load_config
from eopd.run.record import Row, append_jsonl
from eopd.runtime.cluster import resident_bytes
from eopd.telemetry import prometheus
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.metric import MetricError
from eopd.telemetry.prometheus import PrometheusSink
from eopd.telemetry.series import check_row, parse_series, series
from eopd.telemetry.sinks import Telemetry, append_row
from eopd.telemetry.step import STALENESS_AGES, batch_row, config_row

LOST = 'eopd_lost_trajectories_total{reason="too_stale"}'


def every_series() -> Row:
    """A row that holds every metric of the catalogue, each with a value of its own."""
    keys = [series(m.name, **dict.fromkeys(m.labels, "too_stale")) for m in CATALOG.values()]
    return {key: float(i) for i, key in enumerate(keys, start=1)}


class BrokenSink:
    def __init__(self) -> None:
        self.attempts = 0

    def write(self, row: Row) -> None:
        self.attempts += 1
        raise RuntimeError("disk full")


# --- catalogue


def test_names_carry_their_unit_and_kind() -> None:
    suffixes = {"seconds": "_seconds", "bytes": "_bytes", "nats": "_nats", "ratio": "_ratio"}
    for name, metric in CATALOG.items():
        assert re.fullmatch(r"eopd_[a-z0-9_]+", name)
        assert (metric.kind == "counter") == name.endswith("_total"), name
        if metric.unit in suffixes and name != "eopd_loss":
            assert name.removesuffix("_total").endswith(suffixes[metric.unit]), name

        assert metric.meaning.endswith(".") and metric.healthy.endswith("."), name


def test_a_series_names_its_metric_and_labels() -> None:
    assert series("eopd_lost_trajectories_total", reason="too_stale") == LOST
    metric, labels = parse_series(LOST)
    assert (metric.name, dict(labels)) == ("eopd_lost_trajectories_total", {"reason": "too_stale"})
    assert parse_series("eopd_loss") == (CATALOG["eopd_loss"], {})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('eopd_lost_trajectories_total{reason="a b"}', "no metric of this name"),
        ("eopd_los", "did you mean eopd_loss?"),
        ("temperature", "add it to eopd/telemetry/catalog.py"),
        ("eopd_loss{", "no metric of this name"),
        ("eopd_lost_trajectories_total", "labels must be ('reason',)"),
        ('eopd_loss{reason="too_stale"}', "labels must be ()"),
        ('eopd_lost_trajectories_total{cause="too_stale"}', "labels must be ('reason',)"),
    ],
)
def test_an_unknown_series_is_refused(key: str, message: str) -> None:
    with pytest.raises(MetricError, match=re.escape(message)):
        check_row({"eopd_step": 1.0, key: 1.0})


def test_a_row_names_its_step() -> None:
    check_row(every_series())
    with pytest.raises(MetricError, match="eopd_step: missing"):
        check_row({"eopd_loss": 1.0})


# --- rows


def test_a_batch_is_told_by_age() -> None:
    row = batch_row(
        [fakes.header(oldest=oldest, newest=9) for oldest in (9, 9, 8, 4, 1)], version=9
    )
    shares = {age: row[series("eopd_staleness_ratio", versions=age)] for age in STALENESS_AGES}
    assert shares == {"0": 0.4, "1": 0.2, "2": 0.0, "3": 0.0, "4_or_more": 0.4}
    assert (row["eopd_staleness_mean"], row["eopd_staleness_max"]) == (14 / 5, 8)


def test_a_batch_is_told_by_source() -> None:
    sources = ["math", "web", "math", "a b/c"]
    row = batch_row([fakes.header(source=source) for source in sources], version=0)
    shares = {key: share for key, share in row.items() if key.startswith("eopd_source_ratio")}
    assert shares == {
        'eopd_source_ratio{source="math"}': 0.5,
        'eopd_source_ratio{source="web"}': 0.25,
        'eopd_source_ratio{source="a_b_c"}': 0.25,
    }
    many = batch_row([fakes.header(source=f"s{number}") for number in range(17)], version=0)
    assert not any(key.startswith("eopd_source_ratio") for key in many)


def test_the_driver_knows_its_memory() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert resident_bytes() == pytest.approx(int(status["VmRSS"].split()[0]) * 1024, rel=0.1)


def test_a_batch_tells_its_tails() -> None:
    headers = [
        replace(fakes.header(num_response=count), sums={"generate_s": float(count)})
        for count in range(1, 102)
    ]
    row = batch_row(headers, version=0)
    for name in ("eopd_response_tokens_quantile", "eopd_response_quantile_seconds"):
        found = [row[series(name, q=q)] for q in ("0.5", "0.95", "0.99")]
        assert found == pytest.approx([51.0, 96.0, 100.0])

    assert not any(key.startswith("eopd_scoring") for key in row)  # nobody has said it


# --- fan-out and files


def test_a_failing_sink_is_logged_once_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    broken, rows = BrokenSink(), list[Row]()
    telemetry = Telemetry({"the disk": broken.write, "a list": rows.append})

    with caplog.at_level(logging.INFO):
        for step in (1.0, 2.0, 3.0):
            telemetry.write({"eopd_step": step})

    assert [row["eopd_step"] for row in rows] == [1.0, 2.0, 3.0]
    assert broken.attempts == 3
    (record,) = caplog.records
    assert "the disk failed" in record.getMessage()
    assert record.exc_info is not None and "disk full" in str(record.exc_info[1])


def test_every_failing_sink_is_named(caplog: pytest.LogCaptureFixture) -> None:
    Telemetry({"a": BrokenSink().write, "b": BrokenSink().write}).write({"eopd_step": 1.0})
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a", "b"]


def test_a_wrong_row_reaches_no_sink() -> None:
    rows = list[Row]()
    with pytest.raises(MetricError):
        Telemetry({"a list": rows.append}).write({"eopd_step": 1.0, "eopd_los": 1.0})

    assert rows == []


def test_jsonl_is_one_strict_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    numbers = {LOST: 3.0, "eopd_loss": math.nan, "eopd_grad_norm": math.inf}
    append_row(path, {"eopd_step": 2.0, **numbers})
    append_row(path, {"eopd_step": 3.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    first, second, third = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert first == {"step": 1}
    assert list(second) == ["step", "time", "eopd_step", LOST, "eopd_loss", "eopd_grad_norm"]
    assert (second["step"], second[LOST], second["eopd_loss"], second["eopd_grad_norm"]) == (
        2,
        3.0,
        None,
        None,
    )
    assert isinstance(second["step"], int)
    assert 1.7e9 < second["time"] <= third["time"]


def test_append_jsonl_leaves_no_part_of_a_line_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel takes the first bytes of the next line
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))

    try:
        with pytest.raises(OSError, match="No space left on device"):
            append_jsonl(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    append_jsonl(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_append_jsonl_keeps_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    append_jsonl(path, {"prompt": "Grüß\ndich", "tokens": [1, 2]})
    append_jsonl(path, {"prompt": "次"})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Grüß\ndich", "次"]
    assert "次" in lines[1]


# --- Prometheus


def scrape(sink: PrometheusSink, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://{sink.address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read().decode())


def test_a_scrape_shows_the_newest_row_of_its_run() -> None:
    first, second = (
        PrometheusSink(
            "127.0.0.1",
            0,
            run="a",
        ),
        PrometheusSink("127.0.0.1", 0, run="b"),
    )
    try:
        first.write({"eopd_step": 1.0, "eopd_trajectories_total": 8.0, LOST: 0.0})
        first.write({"eopd_step": 2.0, "eopd_trajectories_total": 16.0, LOST: 1.0})
        second.write({"eopd_step": 7.0})
        lines = [line for line in scrape(first).splitlines() if not line.startswith("#")]
        assert sorted(lines) == [
            'eopd_lost_trajectories_total{reason="too_stale",run="a"} 1.0',
            'eopd_step{run="a"} 2.0',
            'eopd_trajectories_total{run="a"} 16.0',
        ]
        assert "# TYPE eopd_trajectories_total counter" in scrape(first)
        assert 'eopd_step{run="b"} 7.0' in scrape(second)
    finally:
        first.close()
        second.close()


def test_who_connects_and_says_nothing_holds_no_thread(monkeypatch, capfd):
    monkeypatch.setattr(prometheus._Handler, "timeout", 0.1)
    sink = PrometheusSink("127.0.0.1", 0, run="a")
    host, _, port = sink.address.rpartition(":")
    before = threading.active_count()
    try:
        with socket.create_connection((host, int(port))) as silent:
            silent.settimeout(10)
            assert silent.recv(1) == b"", "the sink closes it"

        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)

        assert threading.active_count() <= before
    finally:
        sink.close()

    assert capfd.readouterr().err == ""


def test_an_engine_that_is_gone_leaves_no_series_and_a_measurement_stays():
    sink = PrometheusSink("127.0.0.1", 0, run="a")
    name = "eopd_engine_in_flight_trajectories"
    try:
        sink.write({f'{name}{{engine="0"}}': 60.0, f'{name}{{engine="1"}}': 64.0})
        sink.write({'eopd_eval_step{evaluation="a"}': 1.0})
        sink.write({f'{name}{{engine="0"}}': 3.0, 'eopd_eval_step{evaluation="b"}': 2.0})
        shown = scrape(sink)
    finally:
        sink.close()

    assert [line.split()[1] for line in shown.splitlines() if line.startswith(name)] == ["3.0"]
    assert shown.count("eopd_eval_step{") == 2


def test_state_goes_on_between_steps() -> None:
    sink = PrometheusSink("127.0.0.1", 0, run="a")
    try:
        sink.write({"eopd_step": 1.0, "eopd_engines_up": 2.0})
        sink.write({"eopd_engines_up": 0.0})
        lines = [line for line in scrape(sink).splitlines() if not line.startswith("#")]
        assert sorted(lines) == ['eopd_engines_up{run="a"} 0.0', 'eopd_step{run="a"} 1.0']
    finally:
        sink.close()


def test_the_whole_catalogue_is_valid_open_metrics() -> None:
    row = every_series()
    sink = PrometheusSink("127.0.0.1", 0, run="all")

    try:
        sink.write(row)
        text = scrape(sink, "application/openmetrics-text; version=1.0.0")
    finally:
        sink.close()

    families = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    samples = {sample.name: sample for family in families for sample in family.samples}
    assert {name: samples[name].value for name in samples} == {
        parse_series(key)[0].name: row[key] for key in row
    }
    assert all(sample.labels["run"] == "all" for sample in samples.values())


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool comes with Debian's prometheus"
)
def test_promtool_finds_every_name_and_label_conventional() -> None:
    sink = PrometheusSink("127.0.0.1", 0, run="all")
    try:
        sink.write(every_series())
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=scrape(sink), capture_output=True, text=True
        )
    finally:
        sink.close()

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_row_changed_by_its_owner_is_not_served() -> None:
    sink = PrometheusSink("127.0.0.1", 0, run="a")
    try:
        row = {"eopd_step": 1.0}
        sink.write(row)
        row["eopd_step"] = 5.0
        assert 'eopd_step{run="a"} 1.0' in scrape(sink)
    finally:
        sink.close()


def test_a_taken_port_is_a_users_mistake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"telemetry.port: 127.0.0.1:{port} cannot be served"
        ):
            PrometheusSink("127.0.0.1", port, run="a")


def test_close_frees_the_port() -> None:
    sink = PrometheusSink("127.0.0.1", 0, run="a")
    port = int(sink.address.rpartition(":")[2])
    sink.close()
    again = PrometheusSink("127.0.0.1", port, run="a")
    again.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.parametrize(
    ("gate", "threshold"),
    [("{kind: hard, tau: 0.5}", 0.5), ("{kind: sigmoid, tau: 0.7}", 0.7), ("{kind: never}", None)],
)
def test_the_gates_threshold_is_shown_where_it_has_one(
    tmp_path: Path, gate: str, threshold: float | None
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{name: r, batches: 9}}\nstudent: {{model: s}}\nteachers: [{{model: t}}]\nloss: {{gate: {gate}}}\n"
        "prompts: {data: a, held_out: b}\nflow: {batch_prompts: 8, max_staleness: 2}"
    )
    row = dict(config_row(load_config(path, [])))
    assert row.pop("eopd_gate_threshold_nats", None) == threshold
    assert row == {"eopd_batches": 9.0, "eopd_staleness_bound": 2.0}
