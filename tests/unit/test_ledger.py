"""Exactly once: what is trained is never issued again, what is not trained is."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.ledger import Ledger


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_after_a_resume_every_number_is_trained_exactly_once(was_trained):
    ledger = Ledger()
    issued = [ledger.issue() for _ in was_trained]
    before = [i for i, trained in zip(issued, was_trained, strict=True) if trained]
    ledger.train(before)
    state = json.loads(json.dumps(ledger.state()))
    resumed = Ledger.restore(**state)
    after = [resumed.issue() for _ in range(len(issued) - len(before) + 5)]
    resumed.train(after)
    assert sorted(before + after) == list(range(len(before) + len(after)))
    assert resumed.settled.floor == len(before) + len(after)
    assert not resumed.settled.ahead


@given(
    st.lists(
        st.sampled_from(["trained", "dropped", "neither"]),
        min_size=1,
        max_size=60,
    )
)
def test_what_was_dropped_is_not_issued_again_either(fates):
    ledger = Ledger()
    issued = {ledger.issue(): fate for fate in fates}

    for issue, fate in issued.items():
        if fate == "trained":
            ledger.train([issue])
        elif fate == "dropped":
            ledger.drop(issue)

    resumed = Ledger.restore(**json.loads(json.dumps(ledger.state())))
    left = [issue for issue, fate in issued.items() if fate == "neither"]
    assert [resumed.issue() for _ in left] == left
    assert resumed.dropped == ledger.dropped
    assert resumed.settled == ledger.settled


def test_what_was_dropped_after_the_checkpoint_is_not_tried_again():
    ledger = Ledger.restore(floor=4, trained_ahead=[6], lost={}, dropped=[2])
    ledger.drop_again([2, 4, 6, 9])
    assert [ledger.issue() for _ in range(4)] == [5, 7, 8, 10]
    assert ledger.dropped == {2, 4, 9}


def test_what_was_filtered_is_counted_and_remembered_while_it_is_ahead():
    ledger = Ledger()
    for _ in range(5):
        ledger.issue()

    ledger.filter(0)
    ledger.filter(3)
    ledger.drop(4)
    resumed = Ledger.restore(**json.loads(json.dumps(ledger.state())))

    assert (resumed.num_filtered, resumed.filtered_ahead) == (2, {3})
    assert (resumed.dropped, resumed.settled.floor) == ({4}, 1)
    assert [resumed.issue() for _ in range(3)] == [1, 2, 5]
    resumed.train([1, 2])
    assert resumed.state()["filtered_ahead"] == []
    resumed.drop_again([], filtered=[3, 7])
    assert (resumed.num_filtered, resumed.filtered_ahead) == (3, {7})


def test_filtered_numbers_below_the_floor_are_forgotten_batch_by_batch():
    ledger = Ledger()
    for _ in range(6):
        ledger.issue()

    for issue in (0, 1, 4):
        ledger.filter(issue)

    ledger.train([2, 5])
    assert ledger.filtered_ahead == {4}


def test_dropping_many_numbers_again_costs_as_much_for_each_as_dropping_few():
    def seconds(count):
        ledger = Ledger()
        started = time.process_time()
        ledger.drop_again([], filtered=range(1, 2 * count, 2))
        return time.process_time() - started

    seconds(1_000)
    assert min(seconds(80_000) for _ in range(3)) < 8 * 20 * min(seconds(4_000) for _ in range(3))


def test_training_twice_or_something_never_issued_is_loud():
    ledger = Ledger()
    first = ledger.issue()
    ledger.train([first])

    for wrong in (first, 7):
        for settle in (lambda issue: ledger.train([issue]), ledger.drop, ledger.filter):
            with pytest.raises(ValueError, match="twice or never issued"):
                settle(wrong)
