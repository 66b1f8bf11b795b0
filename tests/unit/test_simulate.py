"""Simulations beside what is known of them without one: sums of stages, the slowest stage, and
sorted sleeps.
"""

import asyncio
import json
import random
import time
import xml.etree.ElementTree
from dataclasses import replace

import fakes
import pytest

from eopd.config import ConfigError, load_config
from eopd.planning.balance import counts_of
from eopd.planning.lengths import Lengths
from eopd.planning.needs import Hardware
from eopd.planning.simulate import full_rates, simulate
from eopd.planning.units import read_scale
from eopd.planning.virtual import VirtualLoop
from eopd.planning.workers import Engine, Replica, Work

HARDWARE = Hardware(gpu_bytes=80 * 10**9)


def virtually(work):
    """What a function of no arguments returns that is awaited in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


# --- virtual time


def test_an_hour_of_sleep_passes_at_once_and_in_order():
    async def sleep(hours):
        await asyncio.sleep(3600.0 * hours)
        return hours, asyncio.get_running_loop().time()

    async def several():
        ended = [await one for one in asyncio.as_completed(map(sleep, (3, 1, 2)))]
        return ended, asyncio.get_running_loop().time()

    started = time.monotonic()
    ended, now = virtually(several)
    assert ended == [(1, 3600.0), (2, 7200.0), (3, 10800.0)] and now == 10800.0
    assert time.monotonic() - started < 60.0


def test_a_simulation_that_waits_for_nobody_says_so():
    async def wait():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="waits for something else"):
        virtually(wait)


def seconds_of(issue):
    """How long the response of a number is written."""
    return random.Random(issue).uniform(0.01, 0.1)


class Sleeper(fakes.World):
    """Writes for as long as a response's number says, and notes what ends when."""

    def __init__(self):
        super().__init__()
        self.events = []

    async def generate(self, prompt, sample_index, sampling):
        issue, version = sampling.priority, self.served
        await asyncio.sleep(seconds_of(issue))
        self.events.append(("written", issue))
        return self.write(prompt, sample_index, version)

    async def step(self, batch):
        await asyncio.sleep(0.01)
        self.events.append(("trained", self.served))
        return await super().step(batch)


def test_the_responses_of_a_step_end_in_the_order_of_their_seconds():
    async def events():
        world = Sleeper()
        line = fakes.pipeline(world, batch=8, batches=3, max_staleness=0)
        async for _ in line.steps(0):
            pass

        return world.events

    expected = []
    for step in range(3):
        written = sorted(range(8 * step, 8 * step + 8), key=seconds_of)
        expected += [("written", issue) for issue in written] + [("trained", step)]

    assert virtually(events) == expected


def test_all_seconds_of_a_step_are_those_of_the_given_clock():
    async def steps():
        clock = asyncio.get_running_loop().time
        line = fakes.pipeline(Sleeper(), batch=8, batches=3, max_staleness=0)
        line = replace(line, clock=clock)
        return [done async for done in line.steps(0)], clock()

    done, ended = virtually(steps)
    assert sum(step.seconds["step"] for step in done) == pytest.approx(ended)
    for step in done:
        # the slowest of eight responses takes between 0.05 and 0.1 s, and the loop's own work none
        assert 0.05 < step.seconds["generate"] <= 0.1
        for spans in step.spans.values():
            assert all(0 <= start <= stop <= step.seconds["step"] + 1e-9 for start, stop in spans)


# --- workers


def ends(worker_of, requests):
    """When each request of (start, tokens) ends."""

    async def drive():
        loop, worker = asyncio.get_running_loop(), worker_of()
        work = worker.write if isinstance(worker, Engine) else worker.read

        async def one(start, tokens):
            await asyncio.sleep(start)
            await work(tokens)
            return loop.time()

        return await asyncio.gather(*(one(*request) for request in requests))

    return virtually(drive)


@pytest.mark.parametrize(
    ("full", "requests", "expected"),
    [
        (1, [(0.0, 100)], [1.0]),
        (2, [(0.0, 100)], [2.0]),  # half of its places are taken
        (2, [(0.0, 100), (0.0, 100)], [2.0, 2.0]),
        (2, [(0.0, 100)] * 4, [4.0] * 4),
        (1, [(0.0, 100), (0.5, 50)], [1.5, 1.5]),  # shared from 0.5 on
        (1, [(0.0, 100), (0.0, 50)], [1.5, 1.0]),  # shared until 1.0, and then alone
        (2, [(0.0, 100), (0.0, 50)], [2.0, 1.0]),  # no faster alone
        (1, [(0.0, 100), (5.0, 100)], [1.0, 6.0]),
    ],
)
def test_an_engine_shares_its_rate_and_gives_no_response_more_than_its_place(
    full, requests, expected
):
    assert ends(lambda: Engine(100.0, full), requests) == pytest.approx(expected)


def test_a_replica_reads_one_after_the_other():
    requests = [(0.0, 100), (0.0, 50), (4.0, 100)]
    assert ends(lambda: Replica(100.0), requests) == pytest.approx([1.0, 1.5, 5.0])


# --- lengths


@pytest.mark.parametrize(("mean", "sigma"), [(300, 1.0), (900, 1.0), (50, 2.0), (300, 0.2)])
def test_lengths_have_their_mean_after_the_cut(mean, sigma):
    lengths = Lengths(mean, sigma, 1024)
    drawn = [lengths.of(seed) for seed in range(0, 1 << 31, 100_003)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)
    assert min(drawn) >= 1 and max(drawn) == (1024 if sigma > 0.2 else max(drawn)) <= 1024


def test_lengths_without_a_spread_are_equal():
    assert {Lengths(300, 0.0, 1024).of(seed) for seed in (0, 1 << 30, (1 << 31) - 1)} == {300}
    assert {Lengths(1024, 1.0, 1024).of(seed) for seed in (0, 1 << 30, (1 << 31) - 1)} == {1024}


# --- runs


@pytest.fixture
def run(tmp_path):
    """A function that simulates one worker of each stage, in batches of 4 responses of 100 tokens: so
    a rate of 100 is 4 seconds of a step.
    """

    def simulated(
        generate, score, train, *overrides, sigma=0.0, mean=100, publish_s=0.0, full_at=None
    ):
        config = load_config(
            fakes.write_config(tmp_path, batches=9),
            [
                "flow.batch_prompts=4",
                "rollout.engines=1",
                "learner.ranks=1",
                "rollout.max_response_tokens=100",
                "evaluation.max_response_tokens=100",
                "prompts.max_tokens=10",
                "learner.token_budget=512",
                *overrides,
            ],
        )
        rates = {"generate": generate, "score": score, "train": train}
        work = Work(
            rates=rates,
            lengths=Lengths(mean, sigma, 100),
            publish_s=publish_s,
            full_at=full_at,
        )
        # where all responses are equal, so are the rates of full workers
        full = full_rates(config, work, HARDWARE) if sigma else work
        batch = config.batch_trajectories
        return simulate(config, full, counts=counts_of(config), batch=batch, hardware=HARDWARE)

    return simulated


def seconds(simulation):
    return 3600.0 / simulation.steps_per_hour


def test_a_synchronous_step_of_equal_responses_is_the_sum_of_its_stages(run):
    """All responses end together: 4 s, 2 s and 1 s, and then a publish of half a second."""
    found = run(100.0, 200.0, 400.0, publish_s=0.5)
    assert seconds(found) == pytest.approx(7.5, rel=1e-6)
    assert found.busy == pytest.approx({"generate": 4 / 7.5, "score": 2 / 7.5, "train": 1 / 7.5})
    assert found.engines_full == pytest.approx(4 / 7.5)
    assert found.learner == pytest.approx(
        {
            "wait_rollout": 4 / 7.5,
            "wait_teacher": 2 / 7.5,
            "train": 1 / 7.5,
            "weights": 0.5 / 7.5,
        }
    )
    assert found.staleness_max == 0


@pytest.mark.parametrize(
    ("rates", "staleness"),
    [((100.0, 400.0, 400.0), 2), ((400.0, 100.0, 400.0), 1), ((400.0, 400.0, 100.0), 1)],
)
def test_a_step_that_overlaps_takes_as_long_as_its_slowest_stage(run, rates, staleness):
    found = run(*rates, f"flow.max_staleness={staleness}")
    assert seconds(found) == pytest.approx(4.0, rel=0.02)
    assert found.staleness_mean == pytest.approx(staleness)
    assert found.staleness_max == staleness


def test_workers_with_equal_responses_are_always_full(tmp_path):
    config = load_config(fakes.write_config(tmp_path, batches=9), ["flow.batch_prompts=4"])
    rates = {"generate": 10.0, "score": 20.0, "train": 30.0}
    work = Work(rates=rates, lengths=Lengths(5, 0.0, 8))
    assert full_rates(config, work, HARDWARE).rates == pytest.approx(rates)


def test_two_batches_that_an_engine_writes_together_end_together(run):
    """Of responses of equal length, and with a batch to spare, two batches are written side by side:
    3 s of one lie behind when the other ends. It has ended 1 s later, and slots are free again after
    2 s (scoring and training), so that the engine stands still for 1 s in two steps.
    """
    found = run(100.0, 400.0, 400.0, "flow.max_staleness=1")
    assert seconds(found) == pytest.approx(4.5, rel=1e-6)
    assert found.busy["generate"] == pytest.approx(8 / 9)


def test_a_teacher_behind_a_server_takes_no_time(run):
    served = ("teachers.0.backend=eopd", "teachers.0.server={url: 'http://host:8000'}")
    found = run(100.0, 1.0, 400.0, *served)
    assert seconds(found) == pytest.approx(5.0) and "score" not in found.busy


def test_more_staleness_waits_less_where_lengths_differ(run):
    rates = (100.0, 1000.0, 100.0)
    took = [seconds(run(*rates, f"flow.max_staleness={s}", sigma=1.0, mean=30)) for s in (0, 1, 2)]
    assert took[0] > 1.2 * took[1] > 1.2 * took[2]


@pytest.mark.parametrize("full_at", [None, 1])
def test_a_batch_alone_takes_as_long_as_the_rates_say(run, full_at):
    """By a rate of 30 the engine writes the 120 tokens of a batch in 4 s, to the last response; a
    synchronous step adds nothing here. An engine that does its rate also for the last response is
    always full meanwhile.
    """
    found = run(30.0, 1e6, 1e6, sigma=1.0, mean=30, full_at=full_at)
    assert seconds(found) == pytest.approx(4.0, rel=0.1)
    assert (found.engines_full > 0.99) if full_at else (found.engines_full < 0.8)


def test_a_simulation_is_the_same_each_time(run):
    assert run(100.0, 150.0, 120.0, sigma=1.0, mean=30) == run(
        100.0, 150.0, 120.0, sigma=1.0, mean=30
    )


# --- the command


def test_scales_double():
    assert read_scale("--scale", "8..70") == [8, 16, 32, 64]
    with pytest.raises(ConfigError, match=r"--scale 9\.\.8: must be the fewest and the most"):
        read_scale("--scale", "9..8")


RATES = ("--rates", "generate=10,score=20,train=30")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate"], "--simulate: goes with --rates"),
        ([*RATES, "--scale", "8..16"], "--scale: goes with --simulate"),
        ([*RATES, "--sigma", "1"], "--sigma: goes with --simulate"),
        ([*RATES, "--publish-s", "1"], "--publish-s: goes with --simulate"),
        ([*RATES, "--full-at", "1"], "--full-at: goes with --simulate"),
        ([*RATES, "--simulate", "--plot", "x.svg"], "--plot: goes with --scale"),
        ([*RATES, "--simulate", "--scale", "2..8"], "--scale 2: one worker of each stage needs 3"),
        ([*RATES, "--simulate", "--scale", "8"], "--scale 8: must be the fewest and the most"),
        ([*RATES, "--simulate", "--scale", "8..9", "--devices", "8"], "--devices: goes without"),
        ([*RATES, "--simulate", "--response-tokens", "99999"], "--response-tokens 99999: is above"),
        (
            [*RATES, "--simulate", "--scale", "8..9", "--plot", "/absent/x.svg"],
            "--plot /absent/x.svg: there is no directory /absent",
        ),
    ],
)
def test_a_mistake_is_one_message(options, message, checked_model, tmp_path, eopd):
    done = eopd("plan", fakes.write_whole_config(tmp_path, checked_model), *options)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_the_command_prints_and_draws_what_its_json_holds(checked_model, tmp_path, eopd):
    path, picture = fakes.write_whole_config(tmp_path, checked_model), tmp_path / "scale.svg"
    options = [*RATES, "--response-tokens", "5", "--simulate", "--scale", "4..16"]
    printed = eopd("plan", path, *options, "--plot", picture)
    record = eopd("plan", path, *options, "--json")
    assert printed.code == record.code == 0
    rows = json.loads(record.out)["simulation"]
    assert [row["devices"] for row in rows] == [4, 8, 16]
    assert [row["batch"] for row in rows] == [rows[0]["batch"] * k for k in (1, 2, 4)]
    for row in rows:
        assert f"{row['steps_per_hour']:,.1f}" in printed.out
        assert sum(row["learner"].values()) == pytest.approx(1.0)

    lines = xml.etree.ElementTree.parse(picture).findall(".//{*}polyline")
    assert len(lines) == 6 and len(lines[0].get("points").split()) == 3


@pytest.mark.parametrize(("staleness", "formula"), [(0, "in_turn_steps"), (1, "steps_per_hour")])
def test_the_command_has_the_formula_of_its_flow_and_takes_the_time_of_a_publish(
    checked_model, tmp_path, eopd, staleness, formula
):
    path = fakes.write_whole_config(tmp_path, checked_model)
    options = [*RATES, "--simulate", "--json", "--set", f"flow.max_staleness={staleness}"]
    (row,) = json.loads(eopd("plan", path, *options).out)["simulation"]
    assert row["closed_steps_per_hour"] == row["balance"][formula]
    (slow,) = json.loads(eopd("plan", path, *options, "--publish-s", "3600").out)["simulation"]
    assert slow["steps_per_hour"] < 1.0 < row["steps_per_hour"]
