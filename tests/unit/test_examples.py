"""The examples in docstrings are what the code does."""

import doctest

import pytest

from eopd import ledger


@pytest.mark.parametrize("module", [ledger], ids=lambda module: module.__name__)
def test_examples_hold(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
