"""Runs are grouped into arms, and arms compared over their seeds."""

import math

import pytest

from eopd.run.arms import Interval, by_seed, group_runs, interval, paired, t_quantile

# Printed tables of Student's t, two-sided 95 % and 99 %: NIST/SEMATECH e-Handbook, 1.3.6.7.2.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    9: (2.262, 3.250),
    30: (2.042, 2.750),
    100: (1.984, 2.626),
}


def config(seed=0, **keys):
    return {"run.name": f"any-{seed}", "run.seed": seed, "learner.lr": 1e-5} | keys


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_printed_tables(degrees):
    narrow, wide = TABLE[degrees]
    assert t_quantile(degrees) == pytest.approx(narrow, abs=5.1e-4)
    assert t_quantile(degrees, 0.99) == pytest.approx(wide, abs=5.1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12, 29])
def test_a_quantile_bounds_its_share_of_the_density(degrees):
    limit, pieces = t_quantile(degrees), 20_000
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)

    def density(t):
        return scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)

    width = limit / pieces
    inner = sum(density(i * width) * (4 if i % 2 else 2) for i in range(1, pieces))
    share = 2 * (density(0.0) + inner + density(limit)) * width / 3  # Simpson
    assert share == pytest.approx(0.95, abs=1e-8)


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 1 / math.tan(0.025 * math.pi)), (2, 0.95 * math.sqrt(2 / 0.0975))]
)
def test_quantiles_with_a_formula_are_exact(degrees, exact):
    assert t_quantile(degrees) == pytest.approx(exact, abs=1e-9)


def test_runs_of_one_setting_are_one_arm():
    configs = [config(0), config(0, **{"learner.lr": 3e-5}), config(1)]
    slow, fast = group_runs(configs)
    assert (slow.runs, slow.seeds) == ((0, 2), (0, 1))
    assert (fast.runs, fast.seeds) == ((1,), (0,))
    assert slow.settings == {"learner.lr": 1e-5}
    assert fast.label == "learner.lr=3e-05"


@pytest.mark.parametrize(
    "place",
    [
        "run.name",
        "run.directory",
        "run.upload",
        "cluster.address",
        "telemetry.trackers.0",
        "student.dtype_reason",
        "learner.zero_stage_reason",
        "teachers.1.dtype_reason",
    ],
)
def test_names_and_places_make_no_arm(place):
    (arm,) = group_runs([config(**{place: "here"}), config(**{place: "there"}), config()])
    assert arm.runs == (0, 1, 2)
    assert not arm.settings


@pytest.mark.parametrize(
    "key",
    [
        "run.batches",
        "teachers.1.dtype",
        "run.names",
        "learner.lr",
        "learner.zero_stage",
        "teachers.0.model",
    ],
)
def test_every_other_key_makes_an_arm(key):
    first, second = group_runs([config(**{key: 1}), config(**{key: 2})])
    assert (first.settings, second.settings) == ({key: 1}, {key: 2})


def test_a_key_that_an_arm_lacks_is_left_out_of_its_settings():
    hard = config(**{"loss.gate.kind": "hard", "loss.gate.tau": 0.8})
    never = config(**{"loss.gate.kind": "never"})
    first, second = group_runs([hard, never])
    assert first.label == "loss.gate.kind=hard, loss.gate.tau=0.8"
    assert second.label == "loss.gate.kind=never"


def test_values_of_another_type_are_other_values():
    assert len(group_runs([config(a=1), config(a=True), config(a="1"), config(a=[1])])) == 4


def test_no_runs_have_no_arms():
    assert group_runs([]) == []


def test_a_seed_that_was_run_twice_counts_once():
    (arm,) = group_runs([config(0), config(1), config(1), config(2)])
    assert by_seed(arm, [1.0, 2.0, 4.0, None]) == {0: 1.0, 1: 3.0}


def test_an_interval_is_that_of_students_t():
    # mean 2, standard deviation 1, standard error 1 / sqrt(3), t of two degrees of freedom 4.302653
    found = interval([1.0, 2.0, 3.0])
    assert (found.count, found.mean) == (3, 2.0)
    assert found.high - 2.0 == pytest.approx(4.30265273 / math.sqrt(3), abs=1e-7)
    assert 2.0 - found.low == pytest.approx(4.30265273 / math.sqrt(3), abs=1e-7)


def test_one_value_shows_no_spread():
    assert interval([2.5]) == Interval(count=1, mean=2.5, low=None, high=None)
    assert interval([]) is None


def test_arms_are_compared_over_the_seeds_that_both_have():
    first, other = {0: 1.0, 1: 5.0, 2: 9.0, 7: 100.0}, {2: 10.0, 0: 3.0, 1: 8.0, 8: -100.0}
    found = paired(first, other)
    # differences 2, 3, 1, whatever the spread between the seeds
    assert (found.count, found.mean) == (3, 2.0)
    assert found.high == pytest.approx(2.0 + 4.30265273 / math.sqrt(3), abs=1e-7)
    assert paired({0: 1.0}, {1: 1.0}) is None
