"""What a stock server says, turned into a signal: every part at its place, and nothing broken
passes.
"""

import functools
import json

import httpx
import numpy as np
import pytest

from eopd.config import ConfigError, ServerConfig, TeacherConfig
from eopd.teacher.served import base
from eopd.teacher.served import openai_scorer as remote
from eopd.teacher.served.http import ServerClient, parse
from eopd.teacher.served.openai_scorer import OpenAITeacherScorer, read_rows
from eopd.teacher.signal import SignalError
from eopd.types import Bounds

VOCAB, K = 11, 3
PROBS = np.random.default_rng(5).dirichlet(np.ones(VOCAB), size=3)
TOP = np.argsort(-PROBS, axis=1)[:, :K]
# the second one outside the top 3
SAMPLED = np.array([TOP[0, 1], np.argmin(PROBS[1]), TOP[2, 2]], np.int32)


def said(probs: np.ndarray, token: int, top: np.ndarray) -> dict[str, dict[str, object]]:
    """vLLM's form: the token first, then the top k, keys as text."""
    return {
        str(i): {"logprob": float(np.log(probs[i])), "rank": 9, "decoded_token": None}
        for i in (token, *top)
    }


@pytest.fixture
def rows() -> list[dict[str, dict[str, object]]]:
    return [said(PROBS[row], SAMPLED[row], TOP[row]) for row in range(3)]


def read(rows: list, top_k: int = K, sampled: np.ndarray = SAMPLED, size: int = VOCAB):
    body = json.dumps({"choices": [{"prompt_logprobs": rows}]})
    (choice,) = parse(remote._Completion, httpx.Response(200, text=body)).choices
    return read_rows(
        choice.prompt_logprobs,
        sampled,
        teacher="t",
        top_k=top_k,
        vocab_size=size,
    )


def test_every_part_comes_to_its_place(rows):
    signal = read(rows)
    assert signal.teacher == "t"
    np.testing.assert_allclose(
        np.exp(signal.token_logprobs),
        PROBS[range(3), SAMPLED],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        np.exp(signal.topk_logprobs),
        -np.sort(-PROBS, axis=1)[:, :K],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        np.exp(signal.tail_logprobs),
        np.sort(PROBS, axis=1)[:, : VOCAB - K].sum(1),
        rtol=1e-4,
    )
    assert signal.topk_ids.tolist() == TOP.tolist()
    assert isinstance(signal.entropy, Bounds)
    exact = -(PROBS * np.log(PROBS)).sum(1)
    assert (signal.entropy.low < exact).all()
    assert (exact < signal.entropy.high).all()
    for array in (
        signal.token_logprobs,
        signal.topk_logprobs,
        signal.tail_logprobs,
        signal.entropy.low,
    ):
        assert array.dtype == np.float32

    assert signal.topk_ids.dtype == np.int32


def test_the_order_of_a_mapping_means_nothing(rows):
    turned = [dict(reversed(row.items())) for row in rows]
    assert read(turned).topk_ids.tolist() == TOP.tolist()


def test_the_whole_vocabulary_leaves_no_tail_and_no_doubt():
    everything = np.arange(VOCAB)
    rows = [said(PROBS[row], SAMPLED[row], everything) for row in range(3)]
    signal = read(rows, top_k=VOCAB)
    assert np.isneginf(signal.tail_logprobs).all()
    exact = -(PROBS * np.log(PROBS)).sum(1)
    np.testing.assert_allclose(signal.entropy.low, exact, atol=2e-5)
    np.testing.assert_allclose(signal.entropy.high, exact, atol=2e-5)


def test_a_sampled_token_tied_with_the_last_candidate_is_outside():
    row = {str(i): {"logprob": float(np.log(0.25))} for i in (3, 0, 2)}
    signal = read([row], top_k=2, sampled=np.array([3]), size=4)
    assert signal.topk_ids.tolist() == [[0, 2]]
    assert np.exp(signal.token_logprobs[0]) == pytest.approx(0.25)


def change(rows: list, token: int, logprob: object) -> list:
    rows[1][str(token)] = {"logprob": logprob}
    return rows


def without(rows: list, token: int) -> list:
    del rows[1][str(token)]
    return rows


@pytest.mark.parametrize(
    ("fault", "breaks"),
    [
        ("does not tell token", lambda rows: without(rows, SAMPLED[1])),
        ("does not tell token", lambda rows: [rows[0], None, rows[2]]),
        (
            "2 entries that are not the top 3",
            lambda rows: without(without(rows, TOP[1, 2]), TOP[1, 1]),
        ),
        # the sampled token taken for a candidate
        ("probability one", lambda rows: without(rows, TOP[1, 2])),
        (
            "5 entries that are not the top 3",
            lambda rows: change(rows, np.argsort(PROBS[1])[1], -3.0),
        ),
        (
            "4 entries that are not the top 3",
            lambda rows: change(
                rows,
                SAMPLED[1],
                -0.01,
            ),
        ),
        ("not finite", lambda rows: change(rows, SAMPLED[1], -9999.0)),
        ("not finite", lambda rows: change(rows, TOP[1, 0], float("nan"))),
        ("not finite", lambda rows: change(rows, TOP[1, 0], float("-inf"))),
        ("no log-probability", lambda rows: change(rows, TOP[1, 0], 1e30)),
        (
            "outside the vocabulary of 11",
            lambda rows: change(
                without(rows, TOP[1, 0]),
                11,
                -0.5,
            ),
        ),
        (
            "broken token id",
            lambda rows: change(
                without(rows, TOP[1, 0]),
                -1,
                float(np.log(PROBS[1, TOP[1, 0]])),
            ),
        ),
        ("probability one", lambda rows: change(rows, TOP[1, 0], 0.0)),
    ],
)
def test_a_row_that_is_no_answer_is_refused(rows, fault, breaks):
    with pytest.raises(SignalError, match=f"^row 1 .*{fault}"):
        read(breaks(rows))


ANSWERS = {
    "no list": ({"choices": [{"text": ""}]}, r"choices.0.prompt_logprobs: Field required"),
    "a null": (
        {"choices": [{"prompt_logprobs": None}]},
        r"choices.0.prompt_logprobs: Input should be a valid array",
    ),
    "no choice": ({"choices": []}, "choices.0: Field required"),
    "another length": (
        {"choices": [{"prompt_logprobs": [None]}]},
        "2 tokens were sent, 1 came back",
    ),
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a scorer on a server that serves "big" and answers every completion with
    ``completion``.
    """
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))

    async def started(completion: object, *, model: str = "big", top_k: int = K):
        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/v1/models"):
                listed = {"data": [{"id": "big"}, {"id": "small"}]}
                return httpx.Response(200, json=listed)

            return httpx.Response(200, json=completion)

        client = functools.partial(ServerClient, transport=httpx.MockTransport(answer))
        monkeypatch.setattr(base, "ServerClient", client)
        server = ServerConfig(url="http://teacher.test/x", model=model)
        config = TeacherConfig(backend="openai", model=tmp_path, server=server)

        return await OpenAITeacherScorer.start(config, top_k=top_k, max_sequence_tokens=8)

    return started


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_server_without_prompt_logprobs_is_refused(start, name):
    body, says = ANSWERS[name]
    message = f"teacher cannot score with loss.top_k 3: .*{says}"
    with pytest.raises(ConfigError, match=message):
        await start(body)


async def test_a_name_not_served_is_refused(start):
    message = r"server\.model: bigger is not served there; big, small is"
    with pytest.raises(ConfigError, match=message):
        await start({}, model="bigger")
