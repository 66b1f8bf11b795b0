"""Exactly once: what is trained is never issued again, what is not trained is."""

import json

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
    assert resumed.floor == len(before) + len(after) and not resumed.trained_ahead


def test_training_twice_or_something_never_issued_is_loud():
    ledger = Ledger()
    first = ledger.issue()
    ledger.train([first])
    for wrong in (first, 7):
        with pytest.raises(ValueError, match="twice or never issued"):
            ledger.train([wrong])
