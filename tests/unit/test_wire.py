"""The bytes of a scoring request and answer: what was encoded comes back, and nothing foreign
passes.
"""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eopd.teacher.served.wire import (
    WireError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from eopd.teacher.signal import SignalError, write_signal
from eopd.types import Bounds, Exact, TeacherSignal

# any id, also a negative one: the server says what is wrong with it
IDS = arrays.arrays(np.int32, st.integers(0, 40))


@st.composite
def signals(draw):
    """What a teacher may say: distributions over 60 tokens, K of them named, K = 60 included."""
    num_tokens, top_k, seed = (
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 16, 60])),
        draw(st.integers(0, 99)),
    )
    rng = np.random.default_rng(seed)
    logprobs = np.log(
        rng.dirichlet(np.full(60, draw(st.sampled_from([0.3, 1.0, 50.0]))), num_tokens).clip(1e-30)
    )
    order = np.argsort(-logprobs, axis=1)
    ordered = np.take_along_axis(logprobs, order, 1)
    outside = [np.logaddexp.reduce(row[top_k:]) if top_k < 60 else -np.inf for row in ordered]

    return TeacherSignal(
        teacher="t",
        token_logprobs=logprobs[:, 0].astype(np.float32),
        entropy=Exact((-np.exp(logprobs) * logprobs).sum(1).astype(np.float32)),
        topk_ids=(order[:, :top_k] + draw(st.sampled_from([0, (1 << 24) - 60]))).astype(np.int32),
        topk_logprobs=ordered[:, :top_k].astype(np.float32),
        tail_logprobs=np.array(outside, np.float32),
    )


def read(body: bytes, signal: TeacherSignal) -> TeacherSignal:
    num_tokens, top_k = signal.topk_ids.shape
    return decode_answer(body, teacher="t", num_response_tokens=num_tokens, top_k=top_k)


@given(IDS, IDS)
def test_a_request_comes_back(prompt_ids, response_ids):
    back = decode_request(encode_request(prompt_ids, response_ids))
    assert [ids.dtype for ids in back] == [np.int32, np.int32]
    assert [ids.tolist() for ids in back] == [prompt_ids.tolist(), response_ids.tolist()]


@given(signals())
def test_an_answer_comes_back_bit_for_bit(signal):
    back = read(encode_answer(signal), signal)
    for name in ("token_logprobs", "topk_ids", "topk_logprobs", "tail_logprobs"):
        sent, arrived = getattr(signal, name), getattr(back, name)
        assert (sent.dtype, sent.shape, sent.tobytes()) == (
            arrived.dtype,
            arrived.shape,
            arrived.tobytes(),
        )

    assert back.entropy.entropy.tobytes() == signal.entropy.entropy.tobytes()


def example() -> TeacherSignal:
    """The example of ``read_signal``: probabilities 0.75 and 0.25, the second one sampled."""
    columns = np.array([[0.562, -1.386, -1.386, -0.288]], np.float32)
    return TeacherSignal(
        teacher="t",
        entropy=Exact(columns[:, 0]),
        token_logprobs=columns[:, 1],
        tail_logprobs=columns[:, 2],
        topk_logprobs=columns[:, 3:],
        topk_ids=np.array([[7]], np.int32),
    )


REQUEST = struct.pack("<4sBBHII3i", b"EOPD", 1, 1, 0, 2, 1, 5, 6, 7)
ANSWER = struct.pack("<4sBBHII5f", b"EOPD", 1, 2, 0, 1, 1, 0.562, -1.386, -1.386, -0.288, 7.0)


def test_the_bytes_are_those_of_the_docstring():
    assert encode_request(np.array([5, 6], np.int32), np.array([7], np.int32)) == REQUEST
    assert encode_answer(example()) == ANSWER


def test_a_token_takes_at_most_140_bytes_at_k_16():
    many = TeacherSignal(
        teacher="t",
        entropy=Exact(np.zeros(1000, np.float32)),
        token_logprobs=np.zeros(1000, np.float32),
        tail_logprobs=np.zeros(1000, np.float32),
        topk_logprobs=np.zeros((1000, 16), np.float32),
        topk_ids=np.zeros((1000, 16), np.int32),
    )
    assert (len(encode_answer(many)) - 16) / 1000 <= 140


BROKEN = {
    "bytes that begin with": lambda good: b"EOPX" + good[4:],
    "version 2 of the format": lambda good: good[:4] + b"\2" + good[5:],
    "expected": lambda good: good[:5] + bytes([3 - good[5]]) + good[6:],  # the other kind
    "with flags 1": lambda good: good[:6] + b"\1\0" + good[8:],
    "there are": lambda good: good + b"\0",
    "too few for a header": lambda good: good[:15],
}


@pytest.mark.parametrize("message", BROKEN)
def test_foreign_bytes_are_refused(message):
    with pytest.raises(WireError, match=message):
        decode_request(BROKEN[message](REQUEST))

    with pytest.raises(WireError, match=message):
        read(BROKEN[message](ANSWER), example())


def test_no_part_of_a_message_is_taken_for_a_whole_one():
    for size in range(len(REQUEST)):
        with pytest.raises(WireError):
            decode_request(REQUEST[:size])

    for size in range(len(ANSWER)):
        with pytest.raises(WireError):
            read(ANSWER[:size], example())


@given(st.binary(max_size=80))
def test_noise_is_refused_loudly(noise):
    with pytest.raises(WireError):
        decode_request(noise)

    with pytest.raises(WireError):
        read(noise, example())


def test_counts_beyond_the_body_are_refused_before_anything_is_made():
    with pytest.raises(WireError, match="there are 28"):
        decode_request(REQUEST[:8] + struct.pack("<II", 2**32 - 1, 2**32 - 1) + REQUEST[16:])


@pytest.mark.parametrize(("num_tokens", "top_k"), [(2, 1), (1, 2)])
def test_an_answer_to_another_request_is_refused(num_tokens, top_k):
    with pytest.raises(WireError, match="an answer about 1 tokens with 1 candidates"):
        decode_answer(ANSWER, teacher="t", num_response_tokens=num_tokens, top_k=top_k)


def test_an_answer_that_is_no_distribution_is_refused():
    with pytest.raises(SignalError, match="probability one"):
        read(ANSWER[:28] + struct.pack("<f", -0.1) + ANSWER[32:], example())


def test_bounds_have_no_bytes():
    signal = example()
    bounded = TeacherSignal(
        teacher="t",
        entropy=Bounds(signal.token_logprobs, signal.token_logprobs),
        token_logprobs=signal.token_logprobs,
        tail_logprobs=signal.tail_logprobs,
        topk_logprobs=signal.topk_logprobs,
        topk_ids=signal.topk_ids,
    )
    with pytest.raises(TypeError, match="bounds"):
        write_signal(bounded)
