"""The runs of a directory in a list, their logs, and the request to end one."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import fakes
import pytest

from eopd.cli import logs as printing
from eopd.cli import stop as stopping
from eopd.config import load_config
from eopd.run.directory import RunDirectory
from eopd.run.evaluations import Evaluation, append_evaluation
from eopd.run.lock import held, last_holder
from eopd.run.log_lines import Log
from eopd.run.progress import Progress
from eopd.run.record import HeldOut, Measurement, Summary
from eopd.run.stopping import ask_to_stop, is_taken, take_request
from eopd.runtime import signals
from eopd.runtime.signals import Interruption, obeyed
from eopd.telemetry import listing
from eopd.telemetry.listing import runs_in


@pytest.fixture
def make(tmp_path):
    """A function that makes a run of a name, with so many steps; the last ended at ``at``."""
    path = fakes.write_config(tmp_path, batches=9)

    def made(name, *, below="runs", steps=0, at=1000.0, summary=None):
        place = [f"run.name={name}", f"run.directory={tmp_path / below}"]
        directory = RunDirectory.create(load_config(path, place))
        rows = [{"step": i, "eopd_step": float(i), "time": at} for i in range(1, steps + 1)]
        directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if summary is not None:
            directory.write_summary(summary)

        return directory

    return made


# --- eopd list


def measured(mean):
    return {"reverse_kl": Measurement(mean=mean)}


def test_runs_are_listed_with_status_step_and_newest_reverse_kl(make, tmp_path, eopd, monkeypatch):
    before, both = HeldOut(before=measured(2.0)), HeldOut(before=measured(2.0), after=measured(0.5))
    make("old", steps=9, at=1000.0, summary=Summary(status="completed", held_out=both))
    make("half", steps=4, at=90_000.0, summary=Summary(status="running", held_out=before))
    during = make(
        "during", steps=5, at=4600.0, summary=Summary(status="collapsed", held_out=before)
    )
    for step, name, metric, mean in (
        (2, "held_out", "reverse_kl", 1.5),
        (4, "held_out", "reverse_kl", 1.25),
        (4, "gsm8k", "avg_at_n", 0.1),
    ):
        evaluation = Evaluation(
            step=step,
            phase="during",
            name=name,
            time=1000.0,
            seconds=1.0,
            prompts=4,
            samples=1,
            measurements={metric: Measurement(mean=mean)},
        )
        append_evaluation(during.evaluations, evaluation)

    make(
        "arm",
        below="runs/sweep",
        steps=1,
        at=700.0,
        summary=Summary(status="interrupted"),
    )
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.setattr(listing.time, "time", lambda: 90_300.0)
    done = eopd("list", tmp_path / "runs")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines == [
        ["run", "status", "step", "held-out", "reverse", "KL", "changed"],
        ["half", "dead", "4/9", "2.000", "5", "min", "ago"],
        ["during", "collapsed", "5/9", "1.250", "24", "h", "ago"],
        ["old", "completed", "9/9", "0.500", "1", "d", "ago"],
        ["sweep/arm", "interrupted", "1/9", "-", "1", "d", "ago"],
    ]


def test_names_are_whole_where_no_terminal_shows_them(make, tmp_path, eopd):
    names = [f"kv_cache_memory_bytes-1000-{'x' * 60}-seed-{seed}" for seed in (0, 1)]
    for name in names:
        make(name)

    lines = eopd("list", tmp_path / "runs").out.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(names)


def test_a_sweep_is_no_run_and_said_to_be_one(tmp_path, eopd):
    (tmp_path / "sweep.json").write_text("{}")
    done = eopd("status", tmp_path)
    assert done.code == 2
    assert f"it is a sweep, whose runs `eopd list {tmp_path}` shows" in done.err


def test_a_run_whose_rows_cannot_be_read_hides_no_other(make, tmp_path, eopd):
    make("sound", steps=1, summary=Summary(status="completed"))
    rows = make("barred", steps=1).path / "metrics.jsonl"
    rows.unlink()
    rows.mkdir()
    done = eopd("list", tmp_path / "runs")
    assert done.code == 0
    assert "sound" in done.out and "unreadable" in done.out
    assert done.out.splitlines()[-1] == f"barred: [Errno 21] Is a directory: '{rows}'"
    done = eopd("status", tmp_path / "runs/barred")
    assert (done.code, done.err) == (1, f"error: [Errno 21] Is a directory: '{rows}'\n")


def test_a_link_that_leads_in_a_circle_shows_no_run_twice(make, tmp_path):
    make("a")
    (tmp_path / "runs" / "loop").symlink_to(".")
    assert [run.name for run in runs_in(tmp_path / "runs")] == ["a"]


def test_a_run_whose_files_are_damaged_is_named_below_the_list(make, tmp_path, eopd):
    make("sound", steps=1, summary=Summary(status="completed"))
    broken = make("broken")
    with (broken.path / "config.yaml").open("a") as file:
        file.write("colour: red\n")

    done = eopd("list", tmp_path / "runs")
    assert done.code == 0
    assert "unreadable" in done.out
    assert done.out.splitlines()[-1].startswith(
        f"broken: {broken.path}/config.yaml: colour: unknown"
    )


def test_where_no_runs_lie_is_said_in_one_message(tmp_path, eopd):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "none", f"error: {tmp_path}/none holds no runs; name the directory in which"),
        (tmp_path / "file", f"error: {tmp_path}/file is no run directory (Not a directory)"),
    ):
        done = eopd("list", path)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(message)


def test_a_run_without_rows_was_changed_when_it_was_begun(make, tmp_path):
    begun = time.time()
    make("new")
    (found,) = runs_in(tmp_path / "runs")
    assert found.changed_at == pytest.approx(begun, abs=5.0)
    assert (found.status, found.step, found.reverse_kl) == ("dead", 0, None)


# --- eopd logs


def line(second, role, text):
    return f"2026-11-24T22:54:{second:02} {role} {text}"


@pytest.fixture
def logged(make):
    """A run with the logs of a driver and two engines, one of them as JSON."""
    directory = make("r")
    directory.logs.mkdir()
    row = {"time": "2026-11-24T22:54:03", "role": "rollout-1", "text": "c"}
    for name, lines in {
        "driver": [line(1, "driver", "a"), line(4, "driver", "d")],
        "rollout-0": [line(2, "rollout-0", "b"), line(5, "rollout-0", "e")],
        "rollout-1": [json.dumps(row)],
    }.items():
        (directory.logs / f"{name}.log").write_text("".join(f"{text}\n" for text in lines))

    return directory


def texts(out):
    """The last letter that each line has, of text or JSON."""
    return "".join(line.rstrip('"}')[-1] for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "abcde"),
        (["--lines", "2"], "de"),
        (["-n", "0"], ""),
        (["--role", "driver"], "ad"),
        (["--role", "rollout"], "bce"),
        (["--role", "rollout-1"], "c"),
        (["--follow", "--lines", "3"], "cde"),  # the run has ended: there is nothing to follow
    ],
)
def test_logs_are_one_in_the_order_of_their_times(logged, eopd, options, found):
    done = eopd("logs", logged.path, *options)
    assert (done.code, texts(done.out), done.err) == (0, found, "")


@pytest.mark.parametrize("lines", [3, 4, 5, 6, 9])
def test_fewer_lines_than_asked_for_are_all_there(logged, eopd, lines):
    assert texts(eopd("logs", logged.path, "-n", lines).out) == "abcde"[-lines:]


def test_what_there_are_no_logs_of_is_said(logged, make, eopd):
    done = eopd("logs", logged.path, "--role", "teacher")
    assert done.code == 2
    assert "error: --role teacher: there are logs of driver, rollout-0, rollout-1" in done.err
    done = eopd("logs", make("new").path)
    assert (done.code, done.out) == (2, "")
    assert "holds no logs; the run has not started its workers" in done.err


def test_a_log_goes_on_where_it_was_also_when_it_is_full_and_another_begins(tmp_path):
    path, older = tmp_path / "driver.log", tmp_path / "driver.log.1"
    older.write_text("1\n2\n3\n")
    path.write_text("4\n5\n")
    log = Log(path)
    assert log.last(4) == ["2", "3", "4", "5"]
    assert list(log.added()) == []
    path.write_text("4\n5\n6\n7 is being wri")
    assert list(log.added()) == ["6"]
    path.write_text("4\n5\n6\n7\n8\n")
    path.replace(older)
    assert list(log.added()) == ["7", "8"]
    path.write_text("9\n")
    assert list(log.added()) == ["9"]
    assert list(log.added()) == []


def test_following_shows_what_is_written_until_the_run_ends(logged, eopd, monkeypatch):
    monkeypatch.setattr(printing, "POLL_S", 0.01)
    ended = threading.Event()

    def run():
        with held(logged.path):
            ended.wait()
            with (logged.logs / "driver.log").open("a") as file:
                file.write(line(6, "driver", "f") + "\n")

            (logged.logs / "learner-0.log").write_text(line(7, "learner-0", "g") + "\n")

    thread = threading.Thread(target=run)
    thread.start()
    threading.Timer(0.3, ended.set).start()
    done = eopd("logs", logged.path, "--follow")
    thread.join()
    assert texts(done.out) == "abcdefg"


# --- eopd stop


@contextmanager
def running(directory, monkeypatch, *, soft=True):
    """A run in a thread, which a request ends; yields what it says and how it ended."""
    monkeypatch.setattr(signals, "POLL_S", 0.01)
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    said, ready = [], threading.Event()

    async def run():
        interruption, closed = Interruption(), asyncio.Event()
        interruption.say = said.append

        async def close():
            closed.set()

        try:
            with obeyed(directory.path, interruption, asyncio.current_task()):
                ready.set()
                with interruption.ends_softly(close):
                    await (closed.wait() if soft else asyncio.sleep(30))
        except asyncio.CancelledError:
            said.append("cancelled")

        directory.write_summary(Progress(step=3).summary("interrupted"))

    def process():
        with held(directory.path):
            asyncio.run(run())

    thread = threading.Thread(target=process)
    thread.start()
    ready.wait()
    yield said
    thread.join()


def test_a_run_ends_after_the_step_under_way(make, eopd, monkeypatch):
    directory = make("r", summary=Summary(status="running"))
    with running(directory, monkeypatch) as said:
        done = eopd("stop", directory.path)

    assert (done.code, done.err) == (0, "")
    first, last = done.out.splitlines()
    assert first.startswith("asked process ")
    assert first.endswith(" to end after the step under way, with a checkpoint")
    assert last == f"{directory.path} has ended: interrupted"
    assert said == [
        "stopping after the step under way, with a checkpoint; once more to stop at once"
    ]
    assert is_taken(directory.path)


def test_a_run_ends_at_once(make, eopd, monkeypatch):
    directory = make("r", summary=Summary(status="running"))
    with running(directory, monkeypatch, soft=False) as said:
        done = eopd("stop", directory.path, "--now")

    assert done.out.splitlines()[0].endswith(" to end at once")
    assert said == ["stopping now", "cancelled"]


def test_the_second_request_ends_a_run_at_once(make, monkeypatch):
    directory = make("r", summary=Summary(status="running"))
    with running(directory, monkeypatch, soft=False) as said:
        for count in (1, 2):
            ask_to_stop(directory.path, last_holder(directory.path), now=False)
            while not is_taken(directory.path) or len(said) < count:
                time.sleep(0.01)

    assert said[1:] == ["stopping now", "cancelled"]


def test_a_run_that_is_not_running_cannot_be_stopped(make, eopd, tmp_path):
    directory = make("r", summary=Summary(status="completed"))
    done = eopd("stop", directory.path)
    assert done.code == 2
    assert f"error: {directory.path} is completed: only a run that is running can be" in done.err
    assert is_taken(directory.path)
    assert eopd("stop", tmp_path / "none").code == 2
    (tmp_path / "file").write_text("")
    assert "file is no run directory (Not a directory)" in eopd("stop", tmp_path / "file").err


def test_a_process_of_another_host_that_does_not_answer_may_be_gone(make, eopd, monkeypatch):
    directory = make("r", summary=Summary(status="running"))
    there = {"host": "elsewhere", "pid": 7, "since": 1000.0}
    (directory.path / "run.lock").write_text(json.dumps(there))
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.1)
    done = eopd("stop", directory.path)
    assert done.code == 1
    assert "error: nobody has taken the request within 0 s: process 7 on elsewhere" in done.err
    assert done.err.endswith("Look on elsewhere\n")
    assert is_taken(directory.path), "it is withdrawn"


def test_one_that_is_busy_is_waited_for_with_a_word(make, eopd, monkeypatch):
    directory = make("r", summary=Summary(status="running"))
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.1)
    end = threading.Event()

    def process():
        with held(directory.path):
            end.wait()

    thread = threading.Thread(target=process)
    thread.start()
    while last_holder(directory.path) is None:
        time.sleep(0.01)

    pid = last_holder(directory.path).pid
    threading.Timer(0.5, end.set).start()
    done = eopd("stop", directory.path)
    thread.join()
    assert done.code == 0
    assert f"on {socket.gethostname()}, kill -TERM {pid} asks it by a signal" in done.out
    assert len(done.out.splitlines()) == 3


def test_a_request_is_for_the_process_that_it_names(make):
    directory = make("r").path
    with held(directory):
        here = last_holder(directory)
        assert take_request(directory) is None
        for other in (replace(here, pid=here.pid + 1), replace(here, since=1.0)):
            ask_to_stop(directory, other, now=True)
            assert take_request(directory) is None
            assert is_taken(directory), "it is of no use to anybody"

        for now in (False, True):
            ask_to_stop(directory, here, now=now)
            assert take_request(directory) is now
            assert is_taken(directory)

        for text in ("", "[]", "{}", '{"holder": 1, "now": true}'):
            (directory / "stop.json").write_text(text)
            assert take_request(directory) is None
