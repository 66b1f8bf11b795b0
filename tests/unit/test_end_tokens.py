"""End tokens both ways, against distributions written out as dictionaries."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.teacher.end_tokens import to_student, to_teacher
from eopd.types import Bounds, Exact, StopReason, TeacherSignal

OWN, THEIRS, VOCAB = 0, 2, 12
REMAP = {OWN: THEIRS}


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def signal_of(rows: list[dict[int, float]], top_k: int, sampled: list[int]) -> TeacherSignal:
    """Rows of ``{token id: probability}`` over a whole vocabulary, and the tokens that were
    scored.
    """
    entropies, top_ids, top, tails = [], [], [], []
    for row in rows:
        ranking = sorted(row, key=row.get, reverse=True)
        best, rest = ranking[:top_k], ranking[top_k:]
        entropies.append(entropy_of(row))
        top_ids.append(best)
        top.append([row[token] for token in best])
        tails.append(sum(row[token] for token in rest))

    of_sampled = [row[token] for row, token in zip(rows, sampled, strict=True)]
    return TeacherSignal(
        teacher="t",
        token_logprobs=log(of_sampled),
        entropy=Exact(np.array(entropies, np.float32)),
        topk_ids=np.array(top_ids, np.int32),
        topk_logprobs=log(top),
        tail_logprobs=log(tails),
    )


def entropy_of(row: dict[int, float]) -> float:
    return -sum(p * math.log(p) for p in row.values() if p)


def log(probabilities: object) -> np.ndarray:
    """float32; that of nothing is minus infinity."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, np.float32))


def candidates(signal: TeacherSignal, row: int = 0) -> dict[int, float]:
    """What the loss sees: slots of no probability are ignored."""
    tokens = signal.topk_ids[row].tolist()
    probabilities = np.exp(signal.topk_logprobs[row]).tolist()
    pairs = zip(tokens, probabilities, strict=True)
    return {token: pytest.approx(p, abs=1e-6) for token, p in pairs if p > 0.0}


@pytest.mark.parametrize(
    ("response", "stop", "expected"),
    [
        ((7, 8, 0), StopReason.END_TOKEN, (7, 8, 2)),
        ((7, 0, 8), StopReason.END_TOKEN, (7, 0, 8)),
        ((0,), StopReason.END_TOKEN, (2,)),
        ((0, 0), StopReason.END_TOKEN, (0, 2)),
        ((7, 8, 0), StopReason.LENGTH, (7, 8, 0)),
        ((7, 8, 9), StopReason.LENGTH, (7, 8, 9)),
        ((7, 8, 2), StopReason.END_TOKEN, (7, 8, 2)),
    ],
)
def test_only_the_terminal_end_token_is_replaced(response, stop, expected):
    before = ids(*response)
    copy = to_teacher(before, stop, REMAP)
    assert copy.tolist() == list(expected)
    assert copy.dtype == np.int32
    assert before.tolist() == list(response), "the trajectory itself stays as it is"


def test_every_end_token_has_its_own_partner():
    remap = {0: 2, 5: 6}
    for end, partner in ((0, 2), (5, 6), (2, 2)):
        copy = to_teacher(ids(9, end), StopReason.END_TOKEN, remap)
        assert copy[-1] == partner


LEAST = {4: 0.06, 5: 0.04}
FULL = {2: 0.5, 9: 0.3, 0: 0.1, **LEAST}


@pytest.mark.parametrize(
    ("top_k", "row", "expected", "tail"),
    [
        # both, the teacher's ahead
        (3, FULL, {0: 0.6, 9: 0.3}, 0.1),
        # both, the student's ahead
        (3, {0: 0.5, 9: 0.3, 2: 0.1, **LEAST}, {0: 0.6, 9: 0.3}, 0.1),
        # the sum overtakes
        (3, {9: 0.4, 0: 0.35, 2: 0.15, **LEAST}, {0: 0.5, 9: 0.4}, 0.1),
        # the teacher's alone
        (2, FULL, {0: 0.5, 9: 0.3}, 0.2),
        # the student's alone
        (2, {0: 0.5, 9: 0.3, 2: 0.1, **LEAST}, {0: 0.5, 9: 0.3}, 0.2),
        # none
        (2, {4: 0.5, 9: 0.3, 2: 0.1, 0: 0.06, 5: 0.04}, {4: 0.5, 9: 0.3}, 0.2),
        (1, FULL, {0: 0.5}, 0.5),
        # K = V
        (5, FULL, {0: 0.6, 9: 0.3, **LEAST}, 0.0),
    ],
)
def test_the_teachers_end_token_becomes_the_students(top_k, row, expected, tail):
    raw = signal_of([row], top_k, [9])
    signal = to_student(raw, ids(9), REMAP, num_tokens=VOCAB)
    assert candidates(signal) == expected
    assert math.exp(signal.tail_logprobs[0]) == pytest.approx(tail, abs=1e-6)
    assert signal.topk_logprobs.shape == (1, top_k)
    assert next(iter(candidates(signal))) == max(expected, key=expected.get), "most likely first"
    assert signal.token_logprobs == raw.token_logprobs
    assert signal.entropy == raw.entropy
    dtypes = {signal.topk_ids.dtype, signal.topk_logprobs.dtype, signal.tail_logprobs.dtype}
    assert dtypes == {np.dtype(np.int32), np.dtype(np.float32)}


def test_a_freed_slot_is_last_and_impossible():
    signal = to_student(signal_of([FULL], 3, [9]), ids(9), REMAP, num_tokens=VOCAB)
    assert signal.topk_logprobs[0, 2] == -np.inf
    assert np.isfinite(signal.topk_logprobs[0, :2]).all()


def test_every_position_is_mapped_not_only_the_last():
    rows = [FULL, {9: 0.6, 2: 0.4, 0: 0.0}, FULL]
    raw = signal_of(rows, 2, [9, 9, 2])
    signal = to_student(raw, ids(9, 9, 0), REMAP, num_tokens=VOCAB)
    assert candidates(signal, 0) == {0: 0.5, 9: 0.3}
    assert candidates(signal, 1) == {9: 0.6, 0: 0.4}
    assert candidates(signal, 2) == {0: 0.5, 9: 0.3}


@pytest.mark.parametrize(
    ("row", "top_k", "expected"),
    [
        ({2: 0.5, 9: 0.3, 0: 0.1, 4: 0.1}, 3, 0.6),  # both: the slot
        ({2: 0.5, 9: 0.3, 0: 0.1, 4: 0.1}, 2, 0.5),  # the teacher's alone: it is the slot
        ({0: 0.5, 9: 0.3, 2: 0.1, 4: 0.1}, 2, 0.5),  # the student's alone: the slot again
        ({4: 0.5, 9: 0.3, 2: 0.15, 0: 0.05}, 2, 0.15),  # none: the teacher's
    ],
)
def test_a_stop_has_the_probability_of_its_slot(row, top_k, expected):
    signal = to_student(
        signal_of([row], top_k, [THEIRS]),
        ids(OWN),
        REMAP,
        num_tokens=VOCAB,
    )
    assert math.exp(signal.token_logprobs[0]) == pytest.approx(expected, abs=1e-6)
    seen = candidates(signal)
    assert OWN not in seen or seen[OWN] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "top_k", "expected"),
    [
        ({2: 0.9, 9: 0.07, 4: 0.02, 5: 0.01}, 2, 0.03),  # the tail
        ({2: 0.4, 9: 0.1, 4: 0.09, 5: 0.08, 6: 0.33}, 3, 0.1),  # the last candidate
        ({2: 0.9, 9: 0.07, 4: 0.03}, 3, 0.03),  # K = V has no tail
        ({9: 0.9, 4: 0.095, 2: 0.005}, 1, 0.005),  # less likely still
    ],
)
def test_a_stop_on_which_the_student_went_on_is_not_rewarded(row, top_k, expected):
    response = ids(THEIRS, 9)
    raw = signal_of([row, row], top_k, response.tolist())
    signal = to_student(raw, response, REMAP, num_tokens=VOCAB)
    assert math.exp(signal.token_logprobs[0]) == pytest.approx(expected, abs=1e-6)
    assert signal.token_logprobs[1] == raw.token_logprobs[1]


def test_end_tokens_that_change_places_do_so_at_once():
    row = {0: 0.5, 2: 0.3, 9: 0.2}
    swap = {0: 2, 2: 0}
    swapped = to_student(signal_of([row], 3, [9]), ids(9), swap, num_tokens=VOCAB)
    assert candidates(swapped) == {2: 0.5, 0: 0.3, 9: 0.2}
    stop = to_student(signal_of([row], 3, [0]), ids(2), swap, num_tokens=VOCAB)
    assert math.exp(stop.token_logprobs[0]) == pytest.approx(0.5), (
        "the student's stop, not one given away"
    )
    longer = signal_of([{**row, 9: 0.1, 5: 0.1}], 4, [9])
    chained = to_student(longer, ids(9), {0: 2, 2: 5}, num_tokens=VOCAB)
    assert candidates(chained) == {0: 0.8, 9: 0.1, 2: 0.1}


def test_two_pairs_merge_each_for_itself():
    row = {2: 0.4, 6: 0.3, 5: 0.2, 0: 0.1}
    signal = to_student(signal_of([row], 4, [6]), ids(5), {0: 2, 5: 6}, num_tokens=VOCAB)
    assert candidates(signal) == {0: 0.5, 5: 0.5}
    assert math.exp(signal.token_logprobs[0]) == pytest.approx(0.5)


def test_padding_joins_the_tail():
    row = {9: 0.5, 14: 0.2, 4: 0.15, 13: 0.1, 5: 0.05}
    signal = to_student(signal_of([row], 4, [9]), ids(9), {}, num_tokens=VOCAB)
    assert candidates(signal) == {9: 0.5, 4: 0.15}
    assert math.exp(signal.tail_logprobs[0]) == pytest.approx(0.35)
    assert signal.topk_logprobs[0, 2:].tolist() == [-np.inf, -np.inf]


def test_without_remap_and_padding_nothing_changes():
    raw = signal_of([FULL], 3, [0])
    assert to_student(raw, ids(0), {}, num_tokens=VOCAB) is raw
    assert to_teacher(ids(7, 0), StopReason.END_TOKEN, {}).tolist() == [7, 0]


def test_bounds_stay_bounds():
    raw = signal_of([FULL], 3, [9])
    bounds = Bounds(np.zeros(1, np.float32), np.ones(1, np.float32))
    bounded = replace(raw, entropy=bounds)
    assert to_student(bounded, ids(9), REMAP, num_tokens=VOCAB).entropy is bounds


weights = st.lists(st.integers(1, 1000), min_size=VOCAB, max_size=VOCAB)


def one_to_one(pairs: list[tuple[int, int]]) -> dict[int, int]:
    """A remap of some of the pairs, in which nothing becomes or is two things."""
    own_of = {theirs: own for own, theirs in dict(pairs).items()}
    return {own: theirs for theirs, own in own_of.items()}


pairs_of_ids = st.tuples(st.integers(0, 9), st.integers(0, 9))
remaps = st.lists(pairs_of_ids, max_size=4).map(one_to_one)


def distribution(row: list[int]) -> dict[int, float]:
    total = sum(row)
    return {token: weight / total for token, weight in enumerate(row)}


@given(
    st.lists(weights, min_size=1, max_size=3),
    st.integers(1, VOCAB),
    remaps,
    st.integers(10, VOCAB),
    st.data(),
)
def test_probability_is_kept_and_candidates_stay_a_ranking(rows, top_k, remap, num_tokens, data):
    size = len(rows)
    sampled = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    read = [remap.get(token, token) for token in sampled]
    raw = signal_of([distribution(row) for row in rows], top_k, read)
    signal = to_student(raw, ids(*sampled), remap, num_tokens=num_tokens)
    top = np.exp(signal.topk_logprobs.astype(float)).sum(1)
    tail = np.exp(signal.tail_logprobs.astype(float))
    np.testing.assert_allclose(top + tail, 1.0, atol=1e-5)
    assert (signal.topk_logprobs[:, :-1] >= signal.topk_logprobs[:, 1:]).all()

    for row, kept in zip(signal.topk_ids, signal.topk_logprobs > -np.inf, strict=True):
        named = row[kept].tolist()
        assert len(set(named)) == len(named)
        assert all(token < num_tokens for token in named)
        assert not (set(remap.values()) - set(remap)) & set(named), "a teacher's end token is left"

    np.testing.assert_array_less(signal.token_logprobs, 1e-6)
