"""What travels between a teacher's server and its clients: what was encoded comes back, and nothing
foreign passes.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load, save

from eopd.teacher.served.wire import ScoreRequest, decode_answer, encode_answer, encode_request
from eopd.teacher.signal import SignalError
from eopd.types import Bounds, Exact, TeacherSignal

VOCABULARY = 60


@st.composite
def signals(draw):
    """What a teacher may say: distributions over 60 tokens, K of them named, all of them included."""
    num_tokens = draw(st.integers(1, 9))
    top_k = draw(st.sampled_from([1, 2, 16, VOCABULARY]))
    concentration = draw(st.sampled_from([0.3, 1.0, 50.0]))
    first_id = draw(st.sampled_from([0, (1 << 24) - VOCABULARY]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    weights = np.full(VOCABULARY, concentration)
    logprobs = np.log(rng.dirichlet(weights, num_tokens).clip(1e-30))
    order = np.argsort(-logprobs, axis=1)
    ordered = np.take_along_axis(logprobs, order, 1)
    outside = np.logaddexp.reduce(ordered[:, top_k:], axis=1, initial=-np.inf)

    return TeacherSignal(
        teacher="t",
        token_logprobs=logprobs[:, 0].astype(np.float32),
        entropy=Exact((-np.exp(logprobs) * logprobs).sum(1).astype(np.float32)),
        topk_ids=(order[:, :top_k] + first_id).astype(np.int32),
        topk_logprobs=ordered[:, :top_k].astype(np.float32),
        tail_logprobs=outside.astype(np.float32),
    )


def example() -> TeacherSignal:
    """One token of two, the less likely one, of which one is named."""
    return TeacherSignal(
        teacher="t",
        token_logprobs=np.log([0.25]).astype(np.float32),
        entropy=Exact(np.array([0.5623], np.float32)),
        topk_ids=np.array([[7]], np.int32),
        topk_logprobs=np.log([[0.75]]).astype(np.float32),
        tail_logprobs=np.log([0.25]).astype(np.float32),
    )


def read(body: bytes, signal: TeacherSignal) -> TeacherSignal:
    num_tokens, top_k = signal.topk_ids.shape
    return decode_answer(body, teacher="t", num_response_tokens=num_tokens, top_k=top_k)


@given(signals())
def test_an_answer_comes_back_bit_for_bit(signal):
    back = read(encode_answer(signal), signal)
    assert back.teacher == "t"
    assert encode_answer(back) == encode_answer(signal)


def test_a_request_is_the_json_that_the_server_reads():
    body = encode_request(np.array([504, 3575], np.int32), np.array([2], np.int32))
    assert json.loads(body) == {"prompt_ids": [504, 3575], "response_ids": [2]}
    assert ScoreRequest.model_validate_json(body).response_ids == [2]


def test_a_token_takes_140_bytes_at_k_16_and_a_header():
    def size(num_tokens: int) -> int:
        flat = np.full((num_tokens, 16), np.log(1 / 32), np.float32)
        signal = TeacherSignal(
            teacher="t",
            token_logprobs=flat[:, 0],
            entropy=Exact(flat[:, 0]),
            topk_ids=np.zeros((num_tokens, 16), np.int32),
            topk_logprobs=flat,
            tail_logprobs=flat[:, 0],
        )
        return len(encode_answer(signal))

    assert size(1000) - size(500) <= 500 * 140 + 64
    assert size(1) < 140 + 512


@pytest.mark.parametrize(
    "request_body",
    [
        {"prompt_ids": [], "response_ids": [1]},
        {"prompt_ids": [1], "response_ids": []},
        {"prompt_ids": [1]},
        {"prompt_ids": [1], "response_ids": [-1]},
        {"prompt_ids": [1], "response_ids": ["1"]},
        {"prompt_ids": [1], "response_ids": [True]},
        {"prompt_ids": [1], "response_ids": [1.5]},
        {"prompt_ids": [1], "response_ids": [1], "temperature": 0.5},
    ],
)
def test_a_mistaken_request_is_refused(request_body):
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(json.dumps(request_body))


def test_no_part_of_an_answer_is_taken_for_a_whole_one():
    whole = encode_answer(example())
    for size in range(len(whole)):
        with pytest.raises(SignalError, match="no safetensors"):
            read(whole[:size], example())


@given(st.binary(max_size=80))
def test_noise_is_refused_loudly(noise):
    with pytest.raises(SignalError):
        read(noise, example())


def changed(**tensors: np.ndarray | None) -> bytes:
    kept = load(encode_answer(example())) | tensors
    return save({name: tensor for name, tensor in kept.items() if tensor is not None})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (changed(entropy=None), "was expected"),
        (changed(more=np.zeros(1, np.float32)), "was expected"),
        (changed(entropy=np.zeros(1, np.float64)), "was expected"),
        (changed(topk_ids=np.zeros((1, 1), np.int64)), "was expected"),
        (changed(topk_ids=np.zeros((1, 2), np.int32)), "was expected"),
        (changed(topk_logprobs=np.full((1, 1), -0.1, np.float32)), "probability one"),
        (changed(entropy=np.full(1, np.nan, np.float32)), "not finite"),
    ],
)
def test_an_answer_that_is_no_signal_is_refused(body, message):
    with pytest.raises(SignalError, match=message):
        read(body, example())


@pytest.mark.parametrize(("num_tokens", "top_k"), [(2, 1), (1, 2)])
def test_an_answer_to_another_request_is_refused(num_tokens, top_k):
    body = encode_answer(example())
    with pytest.raises(SignalError, match="was expected"):
        decode_answer(body, teacher="t", num_response_tokens=num_tokens, top_k=top_k)


def test_bounds_do_not_travel():
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
        encode_answer(bounded)
