"""A run survives so many losses within a window, and says which when it does not."""

from types import SimpleNamespace

import pytest

from eopd.runtime import restarts as module
from eopd.runtime.restarts import RestartBudget, TooManyRestartsError


def test_one_loss_too_many_names_the_causes():
    budget = RestartBudget(2, 60.0)
    budget.count_loss("engine 0: died")
    budget.count_loss("engine 0: died")

    with pytest.raises(
        TooManyRestartsError,
        match=r"3 failures within 60 s.*is 2:\n  2 x engine 0: died\n  1 x other",
    ):
        budget.count_loss("other")


def test_what_is_long_past_does_not_count(monkeypatch):
    clock = iter([0.0, 50.0, 61.0, 62.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    budget = RestartBudget(2, 60.0)
    for _ in range(3):
        budget.count_loss("x")

    with pytest.raises(TooManyRestartsError):
        budget.count_loss("x")


@pytest.mark.parametrize(
    ("workers", "survived"),
    [
        (1, 2),
        (8, 2),
        (9, 4),
        (72, 18),
    ],
)
def test_a_larger_run_may_lose_more(workers, survived):
    budget = RestartBudget(2, 60.0, lambda: workers)
    for _ in range(survived):
        budget.count_loss("x")

    share = "" if workers <= 8 else f" for every 8 of {workers} workers"
    with pytest.raises(TooManyRestartsError, match=f"cluster.max_restarts is 2{share}:"):
        budget.count_loss("x")


def test_a_run_that_is_to_survive_nothing_does_not():
    with pytest.raises(TooManyRestartsError):
        RestartBudget(0, 60.0, lambda: 72).count_loss("x")


def test_it_says_how_much_of_it_is_used_and_forgets_what_is_long_past(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    budget = RestartBudget(4, 60.0)
    assert budget.used == 0.0
    budget.count_loss("x")
    now[0] = 50.0
    budget.count_loss("x")
    assert budget.used == 0.5
    now[0] = 61.0
    assert budget.used == 0.25
    assert RestartBudget(0, 60.0).used == 0.0
