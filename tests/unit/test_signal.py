"""Raw rows to a teacher signal: what was written comes back, and nothing broken passes."""

import numpy as np
import pytest

from eopd.teacher.signal import SignalError, num_columns, read_signal
from eopd.types import Exact

VOCAB = 7


def raw_rows(probabilities: np.ndarray, sampled: list[int], top_k: int) -> np.ndarray:
    """The layout, written out by hand: entropy, sampled, tail, k log-probabilities, k ids."""
    rows = []
    for p, token in zip(probabilities, sampled, strict=True):
        order = np.argsort(-p)
        top, rest = order[:top_k], order[top_k:]
        tail = np.log(p[rest].sum()) if len(rest) else -np.inf
        rows.append([-(p * np.log(p)).sum(), np.log(p[token]), tail, *np.log(p[top]), *top])

    return np.array(rows, np.float32)


@pytest.fixture
def raw() -> np.ndarray:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(VOCAB), size=5)
    return raw_rows(probabilities, [0, 6, 2, 2, 3], top_k=3)


def read(raw: np.ndarray, top_k: int = 3):
    return read_signal(raw, teacher="t", num_response_tokens=5, top_k=top_k)


@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
def test_every_column_comes_back_at_its_place(top_k):
    probabilities = np.random.default_rng(top_k).dirichlet(np.ones(VOCAB), size=5)
    sampled = [4, 0, 1, 6, 6]
    signal = read(raw_rows(probabilities, sampled, top_k), top_k)
    assert signal.teacher == "t"
    assert isinstance(signal.entropy, Exact)
    np.testing.assert_allclose(
        signal.entropy.entropy,
        [-(p @ np.log(p)) for p in probabilities],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        np.exp(signal.token_logprobs),
        probabilities[range(5), sampled],
        rtol=1e-5,
    )
    assert signal.topk_ids.tolist() == [
        sorted(range(VOCAB), key=lambda i: -p[i])[:top_k] for p in probabilities
    ]
    np.testing.assert_allclose(
        np.exp(signal.topk_logprobs),
        -np.sort(-probabilities, axis=1)[:, :top_k],
        rtol=1e-5,
    )
    outside = [sum(sorted(p)[: VOCAB - top_k]) for p in probabilities]
    np.testing.assert_allclose(np.exp(signal.tail_logprobs), outside, rtol=1e-5)
    floats = (
        signal.token_logprobs,
        signal.entropy.entropy,
        signal.topk_logprobs,
        signal.tail_logprobs,
    )
    assert {array.dtype for array in floats} == {np.dtype(np.float32)}
    assert signal.topk_ids.dtype == np.int32


def test_the_docstring_example_holds():
    signal = read_signal(
        np.array([[0.562, -1.386, -1.386, -0.288, 0.0]], np.float32),
        teacher="t",
        num_response_tokens=1,
        top_k=1,
    )
    assert signal.topk_ids.tolist() == [[0]]
    np.testing.assert_allclose(
        np.exp([signal.token_logprobs[0], signal.topk_logprobs[0, 0]]),
        [0.25, 0.75],
        atol=1e-3,
    )


def test_the_result_keeps_nothing_of_the_engine_buffer(raw):
    signal = read(raw)
    raw[:] = np.nan
    assert all(
        np.isfinite(a).all()
        for a in (signal.token_logprobs, signal.topk_logprobs, signal.tail_logprobs)
    )


def test_a_response_token_at_k_16_is_at_most_140_bytes():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(32), size=5)
    signal = read(raw_rows(probabilities, [0, 6, 2, 2, 3], top_k=16), top_k=16)
    arrays = (signal.token_logprobs, signal.entropy.entropy, signal.tail_logprobs)
    arrays += (signal.topk_ids, signal.topk_logprobs)
    assert sum(array.nbytes for array in arrays) <= 140 * 5
    # a view would carry the engine's whole buffer along
    assert all(array.base is None for array in arrays)


@pytest.mark.parametrize("column", range(num_columns(3)))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_its_row(raw, column, value):
    raw[2, column] = value
    with pytest.raises(SignalError, match="row 2"):
        read(raw)


def replace_row(raw: np.ndarray, columns: object, values: object) -> np.ndarray:
    raw[3, columns] = values
    return raw


@pytest.mark.parametrize(
    ("fault", "breaks"),
    [
        ("negative entropy", lambda raw: replace_row(raw, 0, -0.1)),
        ("positive log-probability", lambda raw: replace_row(raw, 1, 0.1)),
        ("unsorted", lambda raw: replace_row(raw, slice(3, 6), raw[3, 3:6][::-1])),
        ("broken token id", lambda raw: replace_row(raw, 6, 1.5)),
        ("broken token id", lambda raw: replace_row(raw, 6, -1.0)),
        ("broken token id", lambda raw: replace_row(raw, 6, 2.0**24)),
        ("candidate twice", lambda raw: replace_row(raw, 8, raw[3, 6])),
        ("probability one", lambda raw: replace_row(raw, 2, raw[3, 2] + 0.1)),
    ],
)
def test_a_row_that_is_no_distribution_is_refused(raw, fault, breaks):
    with pytest.raises(SignalError, match=f"row 3 .*{fault}"):
        read(breaks(raw))


@pytest.mark.parametrize(
    "shape",
    [
        (4, 9),
        (6, 9),
        (5, 8),
        (5, 11),
    ],
)
def test_a_wrong_shape_is_refused(shape):
    with pytest.raises(SignalError, match=r"must be float32 \(5, 9\)"):
        read(np.zeros(shape, np.float32))


def test_a_wrong_type_is_refused(raw):
    with pytest.raises(SignalError, match="float64"):
        read(raw.astype(np.float64))
