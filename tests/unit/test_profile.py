"""Where the time of a step goes: made-up rows become a profile, a profile becomes advice, and stages
that are measured alone do not overlap.
"""

import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace

import fakes
import pytest
import rich.console
from fakes import World

from eopd.config import load_config
from eopd.planning.virtual import VirtualLoop
from eopd.runtime import cluster
from eopd.runtime.profile import STEPS, Patience, _alone, _overlapped, cpu_seconds, stage_by_stage
from eopd.telemetry.profile import (
    STAGES,
    Profile,
    advice,
    as_record,
    print_profile,
    summarise,
)
from eopd.telemetry.step import step_row
from eopd.types import LostReason, RunFailedError


def row(**seconds: float) -> dict[str, float]:
    """A step of 10 s, of which 3 are waits, and 50 tokens a second."""
    known = {
        "step": 10.0,
        "generate": 3.0,
        "score": 2.0,
        "wait_rollout": 2.5,
        "wait_teacher": 0.5,
        "train": 6.0,
        "weights": 1.0,
        "between_steps": 0.5,
    }
    named = {f"eopd_{name}_seconds": value for name, value in (known | seconds).items()}
    return named | {"eopd_response_tokens_per_second": 50.0}


def profile(**changes: object) -> Profile:
    """A synchronous step of 10 s with idle cores, in which training is the longest stage."""
    known = Profile(
        steps=8,
        step_s=10.0,
        tokens_per_s=50.0,
        busy_s={"generate": 3.0, "score": 2.0, "train": 6.0, "weights": 1.0},
        alone_s={"generate": 3.0, "score": 2.0, "train": 5.0, "weights": 1.0},
        parts_s={"wait_rollout": 2.5, "wait_teacher": 0.5, "train": 6.0, "weights": 1.0},
        between_s=0.0,
        cpu_s=8.0,
        cores=2,
    )
    return replace(known, **changes)


def alone(**longer: float) -> dict[str, float]:
    return {"generate": 3.0, "score": 2.0, "train": 5.0, "weights": 1.0} | longer


def parts(**other: float) -> dict[str, float]:
    return {"wait_rollout": 0.0, "wait_teacher": 0.0, "train": 9.0, "weights": 1.0} | other


@pytest.fixture
def config(tmp_path):
    def make(max_staleness: int = 0, **sections: str):
        flow = f"{{batch_prompts: 8, max_staleness: {max_staleness}}}"
        return load_config(fakes.write_config(tmp_path, flow=flow, **sections), [])

    return make


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_a_profile_is_the_mean_of_its_steps():
    rows = [row(), row(train=8.0, step=12.0, between_steps=1.5)]
    found = summarise(rows, alone(), wall_s=24.0, cpu_s=(11.0, 13.0), cores=4)
    assert found.steps == 2
    assert found.step_s == 12.0
    assert found.tokens_per_s == (50 * 10 + 50 * 12) / 24
    assert found.busy_s == {"generate": 3.0, "score": 2.0, "train": 7.0, "weights": 1.0}
    assert found.parts_s["train"] == 7.0
    assert found.between_s == 1.0
    assert found.alone_s == alone()
    assert found.cpu_s == 11.0  # 13 when it overlaps
    assert found.cpu_bound_s == 11.0 / 4
    assert (found.longest, found.best_s) == ("train", 5.0)
    assert found.accounted == pytest.approx((2.5 + 0.5 + 7.0 + 1.0 + 1.0) / 12)
    assert found.waits == pytest.approx(3.0 / 12)


def test_the_lower_cpu_time_counts_and_none_where_it_is_not_known():
    found = summarise([row()], alone(), wall_s=10.0, cpu_s=(9.0, 8.0), cores=2)
    assert found.cpu_s == 8.0
    unknown = summarise([row()], alone(), wall_s=10.0, cpu_s=None, cores=2)
    assert unknown.cpu_s is None
    assert unknown.cpu_bound_s == 0.0
    assert unknown.best_s == 5.0


def test_the_cores_may_allow_less_than_the_longest_stage():
    assert profile(cpu_s=14.0).best_s == 7.0


# ---- advice --------------------------------------------------------------------------------------------------------


def test_a_machine_that_is_full_needs_a_larger_one_and_no_setting(config):
    (found,) = advice(profile(cpu_s=17.0), config())
    assert "The machine is full" in found and "8.50 of its 10.00 s" in found
    assert "cluster.cpus is null" in found
    assert "The machine is full" not in " ".join(advice(profile(cpu_s=16.9), config()))


def test_a_synchronous_run_that_waits_is_told_to_overlap(config):
    first, second = advice(profile(), config())
    assert "waits 30% of a step" in first
    assert "flow.max_staleness to 1 (now 0)" in first
    assert "5.00 s at best, in place of 10.00 s" in first
    assert second.startswith("Training is the longest stage (5.00 s")
    assert "learner.ranks (now 1)" in second and "learner.threads (now 1)" in second
    assert "learner.token_budget (now 8192)" in second


@pytest.mark.parametrize(
    "changes",
    [
        {"parts_s": parts(wait_rollout=0.4, wait_teacher=0.5)},  # waits too little
        {"alone_s": alone(train=9.1)},  # would gain too little
    ],
)
def test_a_run_that_cannot_gain_by_overlap_is_not_told_to(config, changes):
    assert "max_staleness" not in " ".join(advice(profile(**changes), config()))


def test_engines_that_stand_still_while_the_learner_waits_need_slots(config):
    idle = profile(busy_s={"generate": 8.9, "score": 2.0, "train": 6.0, "weights": 1.0})
    first, *_ = advice(idle, config(2))
    assert "raise flow.max_staleness (now 2)" in first
    busy = replace(idle, busy_s=dict(idle.busy_s) | {"generate": 9.1})
    assert "max_staleness" not in " ".join(advice(busy, config(2)))


@pytest.mark.parametrize(
    ("longer", "key"),
    [
        ({"generate": 6.0}, "rollout.engines (now 1)"),
        ({"score": 6.0}, "teachers.0.replicas (now 1), teachers.1.replicas (now 3)"),
        ({"train": 6.0}, "learner.ranks (now 1)"),
        ({"weights": 6.0}, "flow.batch_prompts (now 8)"),
    ],
)
def test_the_longest_stage_is_named_with_the_key_that_makes_it_shorter(config, longer, key):
    teachers = "[{name: a, model: t, sources: [x]}, {name: b, model: t, replicas: 3}]"
    learner = parts(weights=longer.get("weights", 1.0))
    found = advice(profile(alone_s=alone(**longer), parts_s=learner), config(1, teachers=teachers))
    assert len(found) == 1
    assert key in found[0]


def test_threads_are_for_ranks_without_a_gpu(config):
    on_gpus = config(1, more="learner: {gpus: 1}")
    assert "learner.threads" not in " ".join(advice(profile(parts_s=parts()), on_gpus))


def test_long_transfers_are_told_of_beside_the_longest_stage(config):
    long = profile(parts_s=parts(train=8.0, weights=2.0))
    _, second = advice(long, config(1))
    assert "20% of a step" in second and "flow.batch_prompts (now 8)" in second
    short = profile(parts_s=parts(train=8.1, weights=1.9))
    assert len(advice(short, config(1))) == 1


def test_where_nothing_stands_out_that_is_said(config):
    (found,) = advice(profile(cpu_s=12.0, parts_s=parts()), config(1))
    assert "Nothing stands out" in found and "6.00 s" in found and "cluster.cpus" in found


# ---- what is printed -----------------------------------------------------------------------------------------------


def printed(found: Profile, of) -> str:
    output = rich.console.Console(file=io.StringIO(), width=200)
    print_profile(found, of, output=output)
    return output.file.getvalue()


def test_the_table_has_every_stage_and_every_cause(config):
    text = printed(profile(step_s=10.5, between_s=0.25), config())
    lines = [line.split() for line in text.splitlines()]
    assert ["train", "5.00", "6.00", "57%"] in lines
    assert ["generate", "3.00", "3.00", "29%"] in lines
    assert ["waits", "for", "engines", "2.50", "24%"] in lines
    assert ["between", "two", "steps", "0.25", "2%"] in lines
    assert ["accounted", "for", "97.6%"] in lines
    assert "10.50 s a step, 50.0 response tokens/s (means of 8 steps)" in text
    assert "could do 5.00 s a step: train is the longest stage, 5.00 s; 8.00 s of CPU wo" in text
    for sentence in advice(profile(step_s=10.5, between_s=0.25), config()):
        assert sentence in text.splitlines()


def test_json_has_the_same_numbers(config):
    record = json.loads(json.dumps(as_record(profile(), config()), allow_nan=False))
    assert record["step_s"] == 10.0 and record["best_s"] == 5.0 and record["cpu_bound_s"] == 4.0
    assert record["parts_s"]["wait_rollout"] == 2.5 and record["accounted"] == 1.0
    assert record["advice"] == advice(profile(), config())
    elsewhere = profile(cpu_s=None)
    assert as_record(elsewhere, config())["cpu_bound_s"] is None
    assert "CPU" not in printed(elsewhere, config())


# ---- stage by stage ------------------------------------------------------------------------------------------------


class Slow(World):
    """Takes 40 ms to write and 20 ms to score whatever number of responses, and remembers what
    went on; ``lose`` is asked of each response that is scored.
    """

    def __init__(self, lose=lambda key: None) -> None:
        super().__init__()
        self.lose = lose
        self.events: list[str] = []
        self.trained: list[list[object]] = []

    async def generate(self, of, sample_index, sampling):
        self.events.append("generate")
        await asyncio.sleep(0.04)
        return self.write(of, sample_index, self.served)

    async def score(self, stored):
        self.events.append("score")
        await asyncio.sleep(0.02)
        reason = self.lose(stored.header.key)
        if reason is None:
            return stored

        of = fakes.prompt(stored.header.key.prompt_id)
        return fakes.lost(of, stored.header.key.sample_index, reason=reason)

    async def step(self, batch):
        self.events.append("train")
        self.trained.append([stored.header.key for stored in batch.stored()])
        await asyncio.sleep(0.03)
        return await super().step(batch)

    async def publish(self, version, on_sent=lambda: None):
        self.events.append("weights")
        await asyncio.sleep(0.01)
        return await super().publish(version, on_sent)


async def test_stages_alone_do_not_overlap_and_their_seconds_are_those_of_the_whole_batch():
    world = Slow()
    line = fakes.pipeline(world)
    started = time.monotonic()
    seconds, tokens = await stage_by_stage(line, 0)
    took = time.monotonic() - started
    assert world.events == [*["generate"] * 4, *["score"] * 4, "train", "weights"]
    expected = {"generate": 0.04, "score": 0.02, "train": 0.03, "weights": 0.01}
    for stage, at_least in expected.items():
        assert at_least <= seconds[stage] < at_least + 0.1

    assert sum(seconds.values()) == pytest.approx(took, abs=0.01)
    assert tokens == 4 * fakes.header().num_response_tokens
    assert world.served == 1
    assert len(world.trained[0]) == 4
    assert line.ledger.settled.floor == 4


async def test_the_loop_goes_on_after_the_batches_that_were_trained_stage_by_stage():
    world = Slow()
    line = fakes.pipeline(world, batches=4)
    await stage_by_stage(line, 0)
    await stage_by_stage(line, 1)
    loop = fakes.pipeline(world, ledger=line.ledger, batches=4)
    steps = [row async for row in fakes.rows(loop, start=2)]
    assert [row["eopd_step"] for row in steps] == [3.0, 4.0]
    assert all(row["eopd_staleness_max"] == 0.0 for row in steps)
    assert line.ledger.settled.floor == 16
    # other prompts and samples than those of the stages
    keys = [key for batch in world.trained for key in batch]
    assert len(keys) == len(set(keys)) == 16


@pytest.mark.parametrize(
    ("reason", "filtered", "dropped"),
    [(LostReason.FILTERED, 2, 0), (LostReason.ROLLOUT_FAILED, 0, 2)],
)
async def test_what_is_lost_is_written_again_and_counts_to_its_stage(reason, filtered, dropped):
    asked = []

    def first_two(key):
        asked.append(key)
        return reason if len(asked) <= 2 else None

    line = fakes.pipeline(Slow(first_two))
    seconds, _ = await stage_by_stage(line, 0)
    assert seconds["generate"] >= 0.08 and seconds["score"] >= 0.04
    assert len(asked) == 6
    assert (line.ledger.num_filtered, len(line.ledger.dropped)) == (filtered, dropped)
    assert line.ledger.settled.floor == 6


async def test_a_batch_that_never_becomes_full_ends_it():
    class Quick(Slow):
        async def generate(self, of, sample_index, sampling):
            return self.write(of, sample_index, self.served)

    with pytest.raises(RunFailedError, match=r"of 4 trajectories did not become full: .*filtered"):
        await stage_by_stage(fakes.pipeline(Quick(lambda key: LostReason.FILTERED)), 0)


# ---- clocks --------------------------------------------------------------------------------------------------------


def test_cpu_seconds_are_those_of_a_process_and_its_descendants():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    before = cpu_seconds(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while cpu_seconds(process.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)

        assert 0.3 <= cpu_seconds(process.pid) < 5.0
        assert cpu_seconds(os.getpid()) >= before + 0.3
        process.communicate(b"\n")

    assert cpu_seconds(process.pid) == 0.0


def test_every_step_of_the_loop_is_accounted_for_and_so_is_the_time_between_two():
    async def run():
        clock = asyncio.get_running_loop().time
        ends, rows = [], []
        async for done in fakes.pipeline(Slow(), batch=4, batches=4, clock=clock).steps(0):
            ends.append(clock())
            rows.append(step_row(done))
            await asyncio.sleep(0.05)  # a checkpoint, say

        return ends, rows

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        ends, rows = runner.run(run())

    assert [row["eopd_step_accounted_ratio"] for row in rows] == pytest.approx([1.0] * 4)
    between = [row["eopd_between_steps_seconds"] for row in rows]
    assert between == pytest.approx([0.0, 0.05, 0.05, 0.05])
    for row, before, end in zip(rows[1:], ends, ends[1:], strict=False):
        known = row["eopd_between_steps_seconds"] + row["eopd_step_seconds"]
        assert known == pytest.approx(end - before)


@pytest.mark.parametrize(
    ("seconds_left", "asked", "batches", "steps"),
    [
        (60.0, None, 3, 7),
        (-1.0, None, 2, 4),
        (-1.0, 3, 2, 5),
    ],
)
async def test_fewer_batches_are_measured_where_they_take_long(seconds_left, asked, batches, steps):
    patience = Patience((asked, asked) if asked else STEPS, time.monotonic() + seconds_left)
    world, told = Slow(), []
    line = fakes.pipeline(world)
    alone_s, _ = await _alone(line, patience, told.append)
    assert len(told) == len(world.trained) == batches
    assert set(alone_s) == set(STAGES)
    loop = fakes.pipeline(world, ledger=line.ledger)
    rows, _, _ = await _overlapped(loop.steps(batches), patience, told.append)
    assert len(world.trained) - batches == steps
    assert [row["eopd_step"] for row in rows] == list(range(batches + 3, batches + steps + 1))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where folders for logs are made."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def starts(monkeypatch):
    """Lets a profile come no further than to Ray, where it ends with an error; remembers that."""
    seen = []

    def end_with(error: BaseException) -> list[object]:
        @contextmanager
        def connect(settings):
            seen.append(settings)
            raise error
            yield

        monkeypatch.setattr(cluster, "connect", connect)
        return seen

    return end_with


@pytest.fixture
def whole(tmp_path, checked_model):
    return fakes.write_whole_config(
        tmp_path,
        checked_model,
        more="rollout: {max_response_tokens: 24}\nevaluation: {max_response_tokens: 24}\n",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set rollout.engine=2", "rollout.engine: unknown key; did you mean engines?"),
        ("--set student.model=/no/where", "student.model: there is no directory /no/where;"),
        ("--set prompts.data=/no.jsonl", "prompts.data: /no.jsonl cannot be read"),
        ("--steps 0", "--steps: must be 1 or more (is 0)"),
    ],
)
def test_a_mistake_is_one_message_before_anything_starts(
    eopd, whole, starts, folders, options, message
):
    seen = starts(RunFailedError("started"))
    done = eopd("profile", whole, *options.split())
    assert done.code == 2
    assert message in done.err and done.err.count("\n") == 1
    assert seen == list(folders.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "is_kept"),
    [(RunFailedError("no engine"), 1, True), (KeyboardInterrupt(), 130, False)],
)
def test_logs_stay_where_a_run_has_failed_and_there_alone(
    eopd, whole, starts, folders, tmp_path, error, code, is_kept
):
    seen = starts(error)
    done = eopd("profile", whole)
    assert done.code == code
    assert len(seen) == 1
    kept = list(folders.iterdir())
    assert len(kept) == is_kept
    failed = f"error: no engine; its logs are in {kept[0]}\n" if kept else ""
    assert done.err == failed or (done.err == "interrupted\n" and not is_kept)
    assert not (tmp_path / "runs").exists()


def test_a_profile_writes_nowhere_else(eopd, whole, monkeypatch, folders, tmp_path):
    """It has no tracker, upload or endpoint of the run, and more batches where it needs them."""
    from eopd.runtime import profile as module

    asked = []

    async def measured(config, prepared, patience, say):
        asked.append((config, patience.steps))
        return profile()

    @contextmanager
    def connect(settings):
        yield

    monkeypatch.setattr(module, "_profile", measured)
    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(cluster, "require_room", lambda *asked: None)
    uploads = ["--set", f"run.upload=file://{tmp_path}/away", "--set", "telemetry.port=9400"]
    trackers = ["--set", "telemetry.trackers=[tensorboard]"]
    done = eopd("profile", whole, *uploads, *trackers, "--steps", "20", "--json")
    assert done.code == 0
    assert json.loads(done.out)["step_s"] == 10.0
    ((config, steps),) = asked
    assert steps == (20, 20)
    assert config.run.upload is config.telemetry.port is None
    assert config.telemetry.trackers == []
    assert config.run.batches == 25  # 3 stage by stage, 2 to warm up; the config has 2
    assert config.run.path.parent.parent == folders
    assert list(folders.iterdir()) == []
    assert not (tmp_path / "runs").exists() and not (tmp_path / "away").exists()
