"""A sweep runs what is not complete, names what failed, and compares its arms; the runs are those
of ``fake_train.py``.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import fakes
import pytest

from eopd.config import ConfigError, UnavailableError, load_config
from eopd.run.evaluations import Evaluation, append_evaluation
from eopd.run.grid import plan_runs, read_grids
from eopd.run.lock import held
from eopd.run.record import Measurement, append_jsonl
from eopd.run.results import final_numbers
from eopd.runtime import sweep_room
from eopd.runtime.placement import Capacity, Node
from eopd.runtime.sweep import Sweep, _last_error
from eopd.runtime.sweep_room import Room

FAKE = Path(__file__).parents[1] / "fake_train.py"
GRID = "loss.gate=hard,never"


class Bench:
    """A config, and sweeps of it whose runs meet the fates that are written down."""

    def __init__(self, root, model):
        self.root = root
        self.said = []
        self.config = fakes.write_whole_config(
            root,
            model,
            more="learner: {token_budget: 9000, lr: 1.0e-5}\ncluster: {cpus: 4}",
        )
        self.fates({})

    def fates(self, fates):
        (self.root / "fates.json").write_text(json.dumps(fates))

    def sweep(self, *overrides, grid=GRID, seeds=(0, 1), say=None, **options):
        grids = read_grids([grid] if grid else [])
        directory, runs = plan_runs(self.config, overrides, grids, seeds)
        train = (sys.executable, str(FAKE), str(self.root / "fates.json"))
        return Sweep(directory, runs, grids, say or self.said.append, train, **options)

    def calls(self):
        path = self.root / "calls.jsonl"
        return fakes.read_rows(path) if path.exists() else []

    def began(self):
        return [call["name"] for call in self.calls() if "began" in call]

    def record(self):
        return json.loads((self.root / "runs" / "r-sweep" / "sweep.json").read_text())


@pytest.fixture
def bench(tmp_path, checked_model):
    return Bench(tmp_path, checked_model)


NAMES = ["gate-hard-seed-0", "gate-never-seed-0", "gate-hard-seed-1", "gate-never-seed-1"]


def test_every_run_is_run_and_the_arms_are_compared(bench):
    sweep = bench.sweep()
    hard, never = sweep.run(1)
    assert bench.began() == NAMES
    assert sweep.status == "completed"
    assert (hard.arm, never.arm) == ("loss.gate=hard", "loss.gate=never")
    assert hard.values["held_out/reverse_kl"] == pytest.approx({0: 1.0, 1: 2.0})
    assert never.means["held_out/reverse_kl"].mean == pytest.approx(2.5)
    # t of one degree of freedom 12.7062, standard error 0.5
    assert never.means["held_out/reverse_kl"].high == pytest.approx(2.5 + 6.3531, abs=1e-4)
    difference = never.differences["held_out/reverse_kl"]
    assert (difference.count, difference.mean) == (2, pytest.approx(1.0))
    assert difference.high == pytest.approx(1.0)
    assert hard.differences == {}

    record = bench.record()
    assert [run["status"] for run in record["runs"]] == ["completed"] * 4
    assert record["grids"] == {"loss.gate": ["hard", "never"]}
    assert record["seeds"] == [0, 1]
    assert record["arms"][1]["settings"] == {"loss.gate.kind": "never"}
    assert record["arms"][1]["differences"]["held_out/reverse_kl"]["mean"] == pytest.approx(1.0)
    page = sweep.report.read_text()
    assert all(name in page for name in NAMES)


def test_each_run_is_trained_with_a_config_of_its_own(bench):
    bench.sweep("run.batches=3").run(1)
    assert {tuple(call["options"]) for call in bench.calls() if "began" in call} == {
        ("--resume", "auto")
    }
    saved = bench.root / "runs" / "r-sweep" / "configs" / "gate-never-seed-1.yaml"
    assert "batches: 3" in saved.read_text()


def test_a_run_that_is_killed_once_it_is_complete_is_complete(bench):
    bench.fates({"gate-never-seed-0": "be killed at the exit"})
    sweep = bench.sweep()
    sweep.run(1)
    assert (sweep.status, list(sweep.failed)) == ("completed", [])


def test_a_run_that_is_killed_while_it_uploads_is_not_complete(bench):
    (bench.root / "elsewhere").mkdir()
    bench.fates({"gate-never-seed-0": "be killed at the exit"})
    sweep = bench.sweep(f"run.upload=file://{bench.root}/elsewhere")
    sweep.run(1)
    assert [run.error for run in sweep.failed] == ["killed by SIGTERM"]


def test_a_run_that_fails_is_named_and_tried_again_alone(bench):
    bench.fates({"gate-never-seed-0": "fail", "gate-hard-seed-1": "die"})
    sweep = bench.sweep()
    sweep.run(1)
    assert bench.began() == NAMES  # the others do not wait for it
    assert sweep.status == "failed"
    assert {run.name: run.error for run in sweep.failed} == {
        "gate-never-seed-0": "no luck today",
        "gate-hard-seed-1": "killed by SIGKILL",
    }
    assert "going well so far" in sweep.failed[0].log.read_text()
    assert [run["status"] for run in bench.record()["runs"]] == [
        "completed",
        "failed",
        "failed",
        "completed",
    ]

    bench.fates({})
    again = bench.sweep()
    hard, _ = again.run(1)
    assert bench.began()[4:] == ["gate-never-seed-0", "gate-hard-seed-1"]
    assert again.status == "completed"
    assert "2 of 4 runs are complete" in bench.said
    assert any(
        text == "gate-never-seed-0: failed before (no luck today); it is tried again"
        for text in bench.said
    )
    assert hard.means["held_out/reverse_kl"].count == 2


def test_a_complete_sweep_is_left_as_it_is_and_can_grow(bench):
    bench.sweep(seeds=(0,)).run(1)
    bench.sweep(seeds=(0,)).run(1)
    assert bench.began() == NAMES[:2]
    bench.sweep(seeds=(0, 1)).run(1)
    assert bench.began() == NAMES
    bench.sweep("run.batches=5", seeds=(0,)).run(1)
    assert bench.began()[4:] == NAMES[:2]


def test_runs_that_a_smaller_sweep_leaves_out_are_named(bench):
    bench.sweep(seeds=(0, 1)).run(1)
    assert not any("other runs" in text for text in bench.said)
    bench.sweep(seeds=(0,)).run(1)
    (told,) = (text for text in bench.said if "other runs" in text)
    assert told.startswith(
        f"note: other runs lie in {bench.root}/runs/r-sweep too, 2 of them, which are not of"
    )
    assert told.endswith("leave them out (gate-hard-seed-1, gate-never-seed-1)")


def test_a_run_that_was_begun_with_other_settings_is_refused_before_any_starts(bench):
    bench.sweep(seeds=(1,)).run(1)
    with pytest.raises(ConfigError) as caught:
        bench.sweep("learner.lr=2.0e-5").run(1)

    assert str(caught.value).startswith("gate-hard-seed-1: ")
    assert "learner.lr 1.0e-05 -> 2.0e-05" in str(caught.value)
    assert len(bench.began()) == 2


def test_more_ranks_are_no_other_setting_where_auto_chooses_the_stage(bench):
    bench.sweep("student.dtype=float32", seeds=(0,)).run(1)
    bench.sweep("student.dtype=float32", "learner.ranks=2", seeds=(0, 1)).run(1)
    assert bench.began() == NAMES
    with pytest.raises(ConfigError, match=r"learner.zero_stage 0 -> 1"):
        bench.sweep("student.dtype=float32", "learner.zero_stage=1").run(1)


@pytest.mark.parametrize(
    ("overrides", "grid", "parallel", "message"),
    [
        ((), "student.model=/nowhere", 1, "model-nowhere-"),
        ((), "prompts.max_tokens=9000,1", 1, "arm prompts.max_tokens=9000: "),
        ((), "prompts.max_tokens=100,1", 1, "max_tokens-1-seed-0: "),
        (("cluster.cpus=1",), GRID, 1, "gate-hard-seed-0: the roles ask for 3 cpus"),
        (("telemetry.port=9400",), GRID, 2, "gate-hard-seed-0: telemetry.port: 9400 can be opened"),
    ],
)
def test_a_mistake_in_any_arm_is_found_before_the_first_starts(
    bench, overrides, grid, parallel, message
):
    with pytest.raises(ConfigError) as caught:
        bench.sweep(*overrides, grid=grid).run(parallel)

    assert str(caught.value).startswith(message)
    assert bench.calls() == []


def test_a_run_of_this_name_is_no_sweep(bench):
    bench.sweep(grid=None, seeds=(0,)).run(1)
    (bench.root / "runs" / "r-sweep").rename(bench.root / "other")
    (bench.root / "other" / "seed-0").rename(bench.root / "runs" / "r-sweep")
    with pytest.raises(ConfigError, match=r"--name: .*r-sweep is a run; choose another name"):
        bench.sweep().run(1)


@pytest.mark.parametrize("text", ["", "[]", '{"runs": 1}', '{"runs": [1, {"status": "failed"}]}'])
def test_a_damaged_record_of_a_sweep_costs_nothing(bench, text):
    path = bench.root / "runs" / "r-sweep" / "sweep.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    sweep = bench.sweep(grid=None, seeds=(0,))
    sweep.run(1)
    assert sweep.status == "completed"
    assert bench.record()["runs"][0]["status"] == "completed"


def test_two_processes_do_not_run_one_sweep(bench):
    with (
        held(bench.root / "runs" / "r-sweep"),
        pytest.raises(ConfigError, match=r"--name: .*r-sweep is being run by process \d+"),
    ):
        bench.sweep().run(1)

    assert bench.calls() == []


def test_a_run_that_another_process_runs_is_left_to_it(bench):
    bench.sweep(seeds=(0,)).run(1)
    with (
        held(bench.root / "runs" / "r-sweep" / "gate-never-seed-0"),
        pytest.raises(ConfigError, match=r"gate-never-seed-0: .* is being run by process \d+"),
    ):
        bench.sweep().run(1)


def test_a_run_that_collapsed_has_ended_and_counts_no_number(bench):
    bench.fates({"gate-never-seed-1": "collapse"})
    ends = ("guard.on_collapse=stop", "run.batches=40")
    sweep = bench.sweep(*ends)
    _, never = sweep.run(1)
    assert sweep.status == "completed"
    assert never.values["held_out/reverse_kl"].keys() == {0}
    bench.sweep(*ends).run(1)
    assert len(bench.began()) == 4


def test_names_are_pinned_once_for_all_runs_and_stay_so(bench, monkeypatch):
    """``learner.timeout_s`` stands for the commit of a name whose branch moves all the time."""
    moving = itertools.count(100)

    def pinned(config, before):
        commit = before.learner.timeout_s if before else float(next(moving))
        learner = config.learner.model_copy(update={"timeout_s": commit})
        return config.model_copy(update={"learner": learner})

    monkeypatch.setattr("eopd.runtime.sweep.pinned", pinned)
    for seeds in ((0, 1), (0, 1, 2)):
        bench.sweep(seeds=seeds).run(1)

    configs = (bench.root / "runs" / "r-sweep" / "configs").glob("*.yaml")
    commits = [load_config(path).learner.timeout_s for path in configs]
    assert commits == [100.0] * 6


def swept_and_disturbed(bench, disturb):
    """Runs a sweep, and calls ``disturb`` once two of its runs have begun."""

    def wait():
        while len(bench.began()) < 2:
            time.sleep(0.05)

        disturb()

    threading.Thread(target=wait).start()
    sweep = bench.sweep()
    sweep.run(1)
    return sweep


def test_a_signal_ends_the_runs_softly_and_begins_no_other(bench):
    bench.fates({"gate-never-seed-0": "wait"})
    sweep = swept_and_disturbed(bench, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert sweep.status == "interrupted"
    assert [run.status for run in sweep.runs] == [
        "completed",
        "interrupted",
        "waiting",
        "waiting",
    ]
    bench.fates({})
    again = bench.sweep()
    again.run(1)
    assert again.status == "completed"
    assert bench.began()[2:] == ["gate-never-seed-0", *NAMES[2:]]


def test_a_job_that_is_stopped_is_one_request_and_its_runs_are_interrupted(bench):
    """Ray sends SIGTERM to the sweep and to its runs, of which one still starts."""
    bench.fates({"gate-never-seed-0": "start"})

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(bench.calls()[-1]["pid"], signal.SIGTERM)

    sweep = swept_and_disturbed(bench, stop)
    assert sweep.status == "interrupted"
    assert [run.status for run in sweep.runs[:3]] == ["completed", "interrupted", "waiting"]
    asked = [text for text in bench.said if text.startswith("ending the runs")]
    assert asked == ["ending the runs; once more to end them at once"]


@contextmanager
def room(cpus):
    """Room for as many CPUs; a run of these tests asks for three."""
    whole = Capacity(cpus=cpus, gpus=0.0)
    options = ("--set", "cluster.cpus=null")
    yield Room(
        nodes=[Node(total=whole, free=whole)], environment={"RAY_ADDRESS": "h:1"}, options=options
    )


@pytest.mark.parametrize(
    ("cpus", "parallel", "most"), [(6, 2, 2), (6, 4, 2), (20, 3, 3), (5, 2, 1)]
)
def test_runs_go_side_by_side_as_far_as_there_is_room(bench, monkeypatch, cpus, parallel, most):
    monkeypatch.setenv("FAKE_TRAIN_S", "1.0")  # longer than the others take to begin under load
    sweep = bench.sweep(open_room=lambda *asked: room(cpus))
    sweep.run(parallel)
    assert sweep.status == "completed"
    assert overlap(bench.calls()) == most
    first = bench.calls()[0]
    assert first["options"] == ["--resume", "auto", "--set", "cluster.cpus=null"]
    assert first["ray"] == "h:1"


def test_a_run_that_finds_no_room_has_not_failed_and_no_other_is_begun(bench, eopd):
    bench.fates({"gate-never-seed-0": "no room"})
    sweep = bench.sweep()
    sweep.run(1)
    assert [run.status for run in sweep.runs] == ["completed", "waiting", "waiting", "waiting"]
    assert (sweep.status, sweep.lack) == ("interrupted", "gate-never-seed-0: 0 of 3 are free")
    assert bench.began() == NAMES[:2]
    record = bench.record()
    assert record["status"] == "interrupted"
    assert [run["error"] for run in record["runs"]] == [None] * 4

    bench.fates({})
    again = bench.sweep()
    again.run(1)
    assert again.status == "completed"
    assert bench.began()[2:] == ["gate-never-seed-0", *NAMES[2:]]


def test_runs_that_are_under_way_beside_one_without_room_end_in_order(bench, monkeypatch):
    monkeypatch.setenv("FAKE_TRAIN_S", "3.0")
    bench.fates({"gate-never-seed-0": "no room"})
    sweep = bench.sweep(open_room=lambda *asked: room(6))
    sweep.run(2)
    assert [run.status for run in sweep.runs] == ["completed", "waiting", "waiting", "waiting"]


def test_want_of_room_has_an_exit_code_of_its_own(bench, eopd, monkeypatch):
    train = (sys.executable, str(FAKE), str(bench.root / "fates.json"))
    monkeypatch.setattr(Sweep.__init__, "__defaults__", (train, None))
    bench.fates({"gate-hard-seed-0": "no room"})
    done = eopd("sweep", bench.config, "--grid", GRID)
    assert done.code == 75
    assert "error: gate-hard-seed-0: 0 of 3 are free. No run was begun after it" in done.err
    assert done.out.splitlines()[-1].startswith("continue with: eopd sweep")


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_cluster_that_others_use_is_waited_for_and_left(bench, monkeypatch, parallel):
    """The first ``run`` is complete, and asks for nothing."""
    joined, asked = [], []

    @contextmanager
    def connect(config):
        joined.append(True)
        yield
        joined.pop()

    def require(roles, config, say):
        assert joined
        asked.append((roles[0].role, config.wait_s))

    fakes_of = {
        "connect": connect,
        "require_room": require,
        "nodes": lambda: [Node(total=Capacity(cpus=6, gpus=0), free=Capacity(cpus=6, gpus=0))],
    }
    for name, fake in fakes_of.items():
        monkeypatch.setattr(sweep_room.cluster, name, fake)

    runs = bench.sweep("cluster.address=h:1", "cluster.cpus=null", "cluster.wait_s=60").runs
    runs[0].status = "completed"
    with sweep_room.room_of(runs, parallel, bench.said.append) as found:
        assert joined == []
        assert found.nodes[0].free.cpus == 6
        assert (found.environment, found.options) == ({}, ())

    assert asked == [("learner", 60.0)] * 3


def test_a_cluster_without_room_for_a_run_is_told_by_its_name(bench, monkeypatch):
    def require(*asked):
        raise UnavailableError("0 of 3 are free")

    monkeypatch.setattr(sweep_room.cluster, "connect", lambda config: nullcontext())
    monkeypatch.setattr(sweep_room.cluster, "require_room", require)
    with pytest.raises(UnavailableError, match=r"^gate-hard-seed-0: 0 of 3 are free$"):
        bench.sweep("cluster.address=h:1", "cluster.cpus=null").run(1)

    assert bench.calls() == []


def overlap(calls):
    """The most runs that were under way at a time."""
    edges = sorted(
        [(call["began"], 1) for call in calls if "began" in call]
        + [(call["ended"], -1) for call in calls if "ended" in call]
    )
    under_way = most = 0
    for _, change in edges:
        under_way += change
        most = max(most, under_way)

    return most


def test_numbers_of_benchmarks_are_those_after_the_last_step(bench):
    sweep = bench.sweep(grid=None, seeds=(0,))
    sweep.run(1)
    directory = sweep.runs[0].directory
    made = {"name": "sums", "time": 5.0, "seconds": 1.0, "prompts": 2, "samples": 4}
    for step, phase, mean in [(2, "after", 0.3), (1, "after", 0.1), (2, "during", 0.2)]:
        measured = {"avg_at_n": Measurement(mean=mean)}
        evaluation = Evaluation(step=step, phase=phase, measurements=measured, **made)
        append_evaluation(directory.evaluations, evaluation)

    damaged = {"step": 2, "phase": "after", "name": "lists"}
    append_jsonl(directory.evaluations, damaged)
    assert final_numbers(directory) == {
        "held_out/reverse_kl": pytest.approx(1.0),
        "sums/avg_at_n": 0.3,
    }


def test_the_command_shows_a_table_and_where_its_files_are(bench, eopd):
    bench.fates({"gate-never-seed-1": "collapse"})
    bench.sweep(seeds=(0, 1, 2)).run(1)
    done = eopd("sweep", bench.config, "--grid", GRID, "--seeds", "0..2")
    assert done.code == 0, done
    assert "6 of 6 runs are complete" in done.out
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    # hard: 1, 2, 3, standard error 1 / sqrt(3), t of two degrees of freedom 4.3027
    assert [line for line in lines if line.startswith("loss.gate=")] == [
        "loss.gate=hard 3 2.0000 ± 2.4841 -",
        # never: 2 and 4, standard error 1, t of one degree of freedom 12.7062
        "loss.gate=never 2 3.0000 ± 12.7062 +1.0000 ± 0.0000",
    ]
    assert "r-sweep/sweep.json" in done.out
    assert "r-sweep/report.html" in done.out


def test_a_mistake_is_one_message(bench, eopd):
    done = eopd("sweep", bench.config, "--grid", "loss.gate=hard,soft", "--seeds", "0..1")
    assert done.code == 2
    assert "arm loss.gate=soft: " in done.err


def test_the_error_of_a_run_is_that_of_its_last_attempt(bench):
    log = bench.root / "a.log"
    log.write_text("error: the disk is full\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("step 1\nRuntimeError: device-side assert\n")

    assert _last_error(log.read_bytes()[start:]) == "RuntimeError: device-side assert"
    assert _last_error(log.read_bytes()) == "the disk is full"
