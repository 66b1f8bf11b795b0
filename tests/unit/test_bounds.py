"""Bounds on an entropy of which only the top k is known: never wrong, and no wider than they
must be.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.teacher.served.bounds import entropy_bounds, logprob_error, tail_logprobs


@st.composite
def distributions(draw) -> tuple[np.ndarray, int]:
    """Sorted probabilities float64 [V], from uniform to hopelessly sure, and a k <= V."""
    logits = np.array(draw(st.lists(st.floats(-60, 0), min_size=2, max_size=40)))
    logits *= draw(st.sampled_from([0.01, 0.3, 1.0]))
    weights = np.exp(np.sort(logits - logits.max())[::-1])
    return weights / weights.sum(), draw(st.integers(1, len(logits)))


def entropy(probs: np.ndarray) -> float:
    return float(-(probs * np.log(probs)).sum())


def told(probs: np.ndarray, top_k: int) -> np.ndarray:
    """What a server says: float32 [1, K]."""
    return np.log(probs[None, :top_k]).astype(np.float32)


@given(distributions(), st.floats(-1, 1))
def test_the_exact_entropy_is_within_whatever_a_server_rounds(drawn, off):
    probs, k = drawn
    size = len(probs)
    shift = 0.9 * off * logprob_error(size)
    shifted = np.log(probs[None, :k]) + shift
    bounds = entropy_bounds(shifted.astype(np.float32), size)
    assert bounds.low[0] <= entropy(probs) <= bounds.high[0]
    assert bounds.low.dtype == bounds.high.dtype == np.float32


@given(distributions())
def test_bounds_meet_where_nothing_or_one_token_is_unknown(drawn):
    probs, _ = drawn
    size = len(probs)
    for k in (size, max(1, size - 1)):
        bounds = entropy_bounds(told(probs, k), size)
        np.testing.assert_allclose(bounds.low[0], entropy(probs), atol=1e-4)
        np.testing.assert_allclose(bounds.high[0], entropy(probs), atol=1e-4)


@given(distributions())
def test_the_highest_is_that_of_an_equal_rest(drawn):
    probs, k = drawn
    if k < len(probs):
        probs[k:] = probs[k:].mean()

    bounds = entropy_bounds(told(probs, k), len(probs))
    assert bounds.high[0] == pytest.approx(entropy(probs), abs=2e-4)


@given(distributions(), st.integers(1, 30))
def test_the_lowest_has_a_rest_in_pieces_of_the_smallest_candidate(drawn, pieces):
    probs, k = drawn
    probs = np.concatenate((probs[:k], np.repeat(probs[k - 1], pieces)))
    probs /= probs.sum()
    bounds = entropy_bounds(told(probs, k), len(probs) + 100)
    assert bounds.low[0] == pytest.approx(entropy(probs), abs=2e-4)


def test_the_docstring_examples_hold():
    logprobs = np.log([[0.6, 0.3]]).astype(np.float32)
    bounds = entropy_bounds(logprobs, 4)
    one = np.array([0.6, 0.3, 0.1])
    both = np.array([0.6, 0.3, 0.05, 0.05])
    assert bounds.low[0] == pytest.approx(entropy(one), abs=1e-4)
    assert bounds.high[0] == pytest.approx(entropy(both), abs=1e-4)
    assert entropy(one) == pytest.approx(0.898, abs=5e-4)
    assert entropy(both) == pytest.approx(0.967, abs=5e-4)
    assert tail_logprobs(logprobs, 4) == pytest.approx([np.log(0.1)], abs=1e-6)


@given(distributions())
def test_the_tail_is_the_mass_outside_as_far_as_float32_tells_it(drawn):
    probs, k = drawn
    tail = tail_logprobs(told(probs, k), len(probs))
    assert tail.dtype == np.float32
    if k == len(probs):
        assert np.isneginf(tail[0])
        return

    assert np.isfinite(tail[0])
    assert np.exp(np.float64(tail[0])) == pytest.approx(probs[k:].sum(), abs=1e-6)
    assert tail[0] <= np.log(probs[k - 1] * (len(probs) - k)) + 1e-5


def test_candidates_above_one_leave_a_little_mass():
    logprobs = np.array([[np.float32(1e-7), np.float32(-16.0)]])
    assert tail_logprobs(logprobs, 50_000)[0] == pytest.approx(-24 * np.log(2))
    bounds = entropy_bounds(logprobs, 50_000)
    assert 0.0 <= bounds.low[0] < 1e-3
    assert bounds.low[0] < bounds.high[0] < 5e-3


def test_rows_are_independent():
    rows = np.log([[0.5, 0.25], [0.9, 0.05], [0.34, 0.33]]).astype(np.float32)
    together = entropy_bounds(rows, 9)
    for index, row in enumerate(rows):
        alone = entropy_bounds(row[None], 9)
        assert alone.low[0] == together.low[index]
        assert alone.high[0] == together.high[index]
