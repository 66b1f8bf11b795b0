"""The HTTP interface of a teacher, over a scorer of ten lines: every code it may answer, and
a fuzz of the whole.
"""

import asyncio

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from eopd.roles import TeacherDownError
from eopd.teacher.served import wire
from eopd.teacher.served.server import Limits, TeacherInfo, create_app
from eopd.teacher.signal import SignalError
from eopd.types import Exact, TeacherSignal

VOCAB, LONGEST, TOP_K = 50, 40, 3
INFO = TeacherInfo(
    name="t",
    top_k=TOP_K,
    vocab_size=VOCAB,
    temperature=0.7,
    max_sequence_tokens=LONGEST,
    head_dtype="float32",
)
LIMITS = Limits(max_requests=2, max_body_bytes=1000)
JSON = {"Content-Type": "application/json"}
BINARY = {"Content-Type": wire.MEDIA_TYPE}
TOKEN = "correct-horse"
BEARER = {"Authorization": f"Bearer {TOKEN}".encode()}


class FakeScorer:
    """A uniform teacher; it waits for ``open``, and raises ``failure``."""

    def __init__(self) -> None:
        self.ready, self.open, self.failure, self.cancelled = True, asyncio.Event(), None, False
        self.open.set()

    async def signal(self, prompt_ids, response_ids):
        assert prompt_ids.dtype == response_ids.dtype == np.int32
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

        if self.failure is not None:
            raise self.failure

        return uniform(prompt_ids, response_ids)


def uniform(prompt_ids, response_ids) -> TeacherSignal:
    """All K most likely tokens are the first of the prompt; the sampled token's value is the
    response's.
    """
    size = len(response_ids)
    return TeacherSignal(
        teacher="t",
        token_logprobs=-np.asarray(response_ids, np.float32) / 3,
        entropy=Exact(np.full(size, np.log(VOCAB), np.float32)),
        topk_ids=np.tile((prompt_ids[0] + np.arange(TOP_K, dtype=np.int32)) % VOCAB, (size, 1)),
        topk_logprobs=np.full((size, TOP_K), -np.log(VOCAB), np.float32),
        tail_logprobs=np.full(size, np.log1p(-TOP_K / VOCAB), np.float32),
    )


@pytest.fixture
def scorer():
    return FakeScorer()


@pytest.fixture
async def client(scorer):
    app = create_app(scorer, INFO, LIMITS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


@pytest.fixture
async def guarded(scorer):
    app = create_app(scorer, INFO, LIMITS, TOKEN)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


def binary(prompt_ids, response_ids) -> bytes:
    return wire.encode_request(np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))


async def test_json_scores(client):
    answer = await client.post("/v1/score", json={"prompt_ids": [5, 6], "response_ids": [7, 8, 2]})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body, expected = answer.json(), uniform(np.array([5, 6]), np.array([7, 8, 2]))
    assert sorted(body) == sorted(TeacherSignal.__dataclass_fields__)
    assert body["teacher"] == "t"
    assert np.array(body["entropy"], np.float32).tobytes() == expected.entropy.entropy.tobytes()
    for name in ("token_logprobs", "topk_logprobs", "tail_logprobs", "topk_ids"):
        array = getattr(expected, name)
        assert np.array(body[name], array.dtype).tobytes() == array.tobytes()


async def test_binary_scores(client):
    answer = await client.post("/v1/score", content=binary([5, 6], [7, 8, 2]), headers=BINARY)
    assert (answer.status_code, answer.headers["content-type"]) == (200, wire.MEDIA_TYPE)
    assert answer.content == wire.encode_answer(uniform(np.array([5, 6]), np.array([7, 8, 2])))


async def test_a_tail_without_mass_is_null_in_json(client, scorer):
    async def signal(prompt_ids, response_ids):
        found = uniform(prompt_ids, response_ids)
        found.tail_logprobs[0] = -np.inf
        return found

    scorer.signal = signal
    answer = await client.post("/v1/score", json={"prompt_ids": [5], "response_ids": [7, 8]})
    assert answer.json()["tail_logprobs"] == [None, pytest.approx(np.log1p(-TOP_K / VOCAB))]


async def test_info_health_and_ready(client, scorer):
    assert (
        (await client.get("/v1/info")).json()
        == INFO.model_dump()
        == INFO.model_dump() | {"wire_version": 1}
    )
    assert (await client.get("/ready")).json() == {"status": "ready"}
    scorer.ready = False
    assert (await client.get("/health")).json() == {"status": "alive"}
    assert (await client.get("/v1/info")).status_code == 200

    for answer in (
        await client.get("/ready"),
        await client.post("/v1/score", content=binary([1], [1])),
    ):
        assert (answer.status_code, answer.json()) == (503, {"detail": "the engine is not up"})
        assert answer.headers["Retry-After"] == "1"


MISTAKES = {
    "not JSON": ("body: Invalid JSON", JSON, b"[1, 2"),
    "empty body": ("body: Invalid JSON", JSON, b""),
    "no object": ("body: Input should be an object", JSON, b"[1, 2]"),
    "a key is missing": ("response_ids: Field required", JSON, b'{"prompt_ids": [1]}'),
    "a key too many": ("k: Extra inputs", JSON, b'{"prompt_ids": [1], "response_ids": [1], "k": 3}'),
    "text": ("prompt_ids.1: Input should be a valid integer", JSON, b'{"prompt_ids": [1, "2"], "response_ids": [1]}'),
    "a truth value": ("0: Input should be a valid integer", JSON, b'{"prompt_ids": [true], "response_ids": [1]}'),
    "no integer": ("0: Input should be a valid integer", JSON, b'{"prompt_ids": [1.5], "response_ids": [1]}'),
    "infinity": ("0: Input should be a valid integer", JSON, b'{"prompt_ids": [1e999], "response_ids": [1]}'),
    "no prompt": ("prompt_ids: must not be empty", JSON, b'{"prompt_ids": [], "response_ids": [1]}'),
    "no response": ("response_ids: must not be empty", JSON, b'{"prompt_ids": [1], "response_ids": []}'),
    "id below": ("prompt_ids: -1 is outside", JSON, b'{"prompt_ids": [1, -1], "response_ids": [1]}'),
    "id above": ("response_ids: 50 is outside", JSON, b'{"prompt_ids": [1], "response_ids": [50, 1]}'),
    "id far above": ("4294967297 is outside", JSON, b'{"prompt_ids": [1], "response_ids": [4294967297]}'),
    "id beyond": (f"{2**70} is outside", JSON, b'{"prompt_ids": [1], "response_ids": [1, %d]}' % 2**70),
    "too long": ("are 41 tokens; the limit is 40", JSON, b'{"prompt_ids": [1], "response_ids": [%s]}'
                 % b",".join([b"1"] * LONGEST)),
    "binary: no prompt": ("prompt_ids: must not be empty", BINARY, binary([], [1])),
    "binary: no response": ("response_ids: must not be empty", BINARY, binary([1], [])),
    "binary: id below": ("prompt_ids: -1 is outside", BINARY, binary([-1, 60], [1])),
    "binary: id above": ("response_ids: 50 is outside", BINARY, binary([1], [50])),
    "binary: too long": ("are 41 tokens; the limit is 40", BINARY, binary([1] * LONGEST, [1])),
    "binary: cut": ("take 24 bytes; there are 23", BINARY, binary([1], [1])[:-1]),
    "binary: JSON": ("too few for a header", BINARY, b"{}"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_mistaken_request_is_one_message(client, name):
    message, headers, body = MISTAKES[name]
    answer = await client.post("/v1/score", content=body, headers=headers)
    assert answer.status_code == 422
    assert list(answer.json()) == ["detail"] and message in answer.json()["detail"]


async def test_the_longest_sequence_passes_and_fits_the_derived_limit(scorer):
    info = INFO.model_copy(update={"vocab_size": 200_000, "max_sequence_tokens": 9000})
    limits = Limits.of(1, info)
    transport = httpx.ASGITransport(create_app(scorer, info, limits))

    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        ids = ", ".join(["199999"] * 4500)
        body = f'{{\n "prompt_ids": [{ids}],\n "response_ids": [{ids}]\n}}'
        answer = await client.post("/v1/score", content=body, headers=JSON)

    assert answer.status_code == 200
    assert len(body) < limits.max_body_bytes < 2 * len(body)


@pytest.mark.parametrize("media_type", ["text/plain", "application/jsonx", "", None])
async def test_another_media_type_is_refused(client, media_type):
    headers = {} if media_type is None else {"Content-Type": media_type}
    answer = await client.post("/v1/score", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert "application/json or application/vnd.eopd.score" in answer.json()["detail"]


async def test_a_media_type_may_have_parameters_and_capitals(client):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = b'{"prompt_ids": [1], "response_ids": [1]}'
    assert (await client.post("/v1/score", content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize("length", [None, "10", "1001"])
async def test_a_large_body_is_refused_as_it_streams(client, length):
    read = []

    async def stream():
        for piece in range(100):
            read.append(piece)
            yield b" " * 100

    headers = JSON | ({} if length is None else {"Content-Length": length})
    answer = await client.post("/v1/score", content=stream(), headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (
        413,
        "the body is larger than 1000 bytes",
    )
    assert len(read) == 11


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": b"Bearer wrong"},
        {"Authorization": "Bearer körrekt".encode()},
        {"Authorization": f"Bearer {TOKEN}x".encode()},
        {"Authorization": f"Basic {TOKEN}".encode()},
        {"Authorization": b"Bearer"},
    ],
)
async def test_without_the_token_nobody_scores(guarded, headers):
    body = {"prompt_ids": [1], "response_ids": [1]}
    for answer in (
        await guarded.get("/v1/info", headers=headers),
        await guarded.post("/v1/score", json=body),
    ):
        assert (answer.status_code, answer.json()) == (
            401,
            {"detail": "a valid bearer token is needed"},
        )
        assert answer.headers["WWW-Authenticate"] == "Bearer"

    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert (await guarded.get(path)).status_code == 200


async def test_with_the_token_everybody_scores(guarded):
    assert (await guarded.get("/v1/info", headers=BEARER)).status_code == 200
    answer = await guarded.post("/v1/score", content=binary([1], [1]), headers=BEARER | BINARY)
    assert answer.status_code == 200


async def metric(client, series: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(series + " ")), "0"))


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0)


async def test_load_beyond_the_limit_is_shed_and_the_rest_is_answered(client, scorer):
    scorer.open.clear()

    def score():
        return client.post("/v1/score", content=binary([1], [1]), headers=BINARY)

    async def full():
        return await metric(client, 'eopd_teacher_in_flight_requests{teacher="t"}') == 2

    waiting = [asyncio.create_task(score()) for _ in range(2)]
    await until(full)
    refused = await score()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert refused.json() == {"detail": "2 requests are in flight, which is the limit"}
    scorer.open.set()
    assert [(await answer).status_code for answer in waiting] == [200, 200]
    assert (await score()).status_code == 200


@pytest.mark.parametrize(
    ("failure", "code", "headers"),
    [
        (SignalError("row 3 is bad"), 500, {}),
        (TeacherDownError("the engine died"), 503, {"retry-after": "1"}),
    ],
)
async def test_a_failing_engine_is_not_the_client_s_mistake(client, scorer, failure, code, headers):
    scorer.failure = failure
    answer = await client.post("/v1/score", content=binary([1], [1]), headers=BINARY)
    assert (answer.status_code, answer.json()) == (code, {"detail": str(failure)})
    assert headers.items() <= answer.headers.items()


async def test_metrics_count_requests_tokens_and_seconds(guarded, scorer):
    headers = BEARER | BINARY
    for body in (binary([1], [1, 2, 3]), binary([1, 1], [1, 2]), b"", b""):
        await guarded.post("/v1/score", content=body, headers=headers)

    await guarded.post("/v1/score", content=binary([1], [1]), headers=BINARY)
    scorer.failure = ValueError("a defect of ours")
    with pytest.raises(ValueError, match="a defect of ours"):
        await guarded.post("/v1/score", content=binary([1], [1]), headers=headers)

    expected = {
        'eopd_teacher_requests_total{code="200",teacher="t"}': 2,
        'eopd_teacher_requests_total{code="422",teacher="t"}': 2,
        'eopd_teacher_requests_total{code="401",teacher="t"}': 1,
        'eopd_teacher_requests_total{code="500",teacher="t"}': 1,
        'eopd_teacher_scored_tokens_total{teacher="t"}': 5,
        'eopd_teacher_request_seconds_count{teacher="t"}': 2,
        'eopd_teacher_in_flight_requests{teacher="t"}': 0,
    }
    assert {series: await metric(guarded, series) for series in expected} == expected


@pytest.mark.parametrize("body_is_whole", [True, False])
async def test_a_client_that_hangs_up_costs_the_engine_nothing(client, scorer, body_is_whole):
    scorer.open.clear()
    body = binary([1], [1])
    messages = [
        {"type": "http.request", "body": body, "more_body": not body_is_whole},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/v1/score", "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", wire.MEDIA_TYPE.encode())],
    }  # fmt: skip
    await client._transport.app(scope, receive, send)
    await asyncio.sleep(0)
    assert scorer.cancelled == body_is_whole
    assert await metric(client, 'eopd_teacher_requests_total{code="499",teacher="t"}') == 1
    assert await metric(client, 'eopd_teacher_in_flight_requests{teacher="t"}') == 0


# --- fuzz ------------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10)
schemathesis.openapi.media_type(wire.MEDIA_TYPE, st.builds(binary, ids, ids))


# Fuzzed lists are short, and none is too long; a scorer without a loop of its own answers at once.
described = schemathesis.openapi.from_asgi(
    "/openapi.json",
    create_app(
        FakeScorer(),
        INFO.model_copy(update={"max_sequence_tokens": 100_000}),
        Limits(max_requests=9, max_body_bytes=1 << 16),
        TOKEN,
    ),
)


@described.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered_as_described(case):
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})
