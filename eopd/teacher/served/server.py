"""The HTTP interface of a teacher, for students on other clusters.

In: prompts and responses as token ids, in JSON or in the bytes of ``wire.py``. Out: the teacher's
signal, in the same form. ``create_app`` is the whole interface, over any scorer; ``serving.py``
puts a real engine behind it. Left out: TLS, which belongs to a proxy in front, and queues: what is
too much is refused, and the client tries again.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictInt, ValidationError
from starlette.requests import ClientDisconnect

from eopd import __version__
from eopd.roles import TeacherDownError
from eopd.teacher.served import wire
from eopd.teacher.signal import SignalError
from eopd.types import Exact, Int32Array, TeacherSignal

RETRY_AFTER_S: Final = 1
_BUCKETS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_JSON: Final = "application/json"


class ServedScorer(Protocol):
    """What the server needs of a teacher."""

    @property
    def ready(self) -> bool:
        """Whether a request can be answered."""
        ...

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Score a response; raises ``SignalError`` for this request, ``TeacherDownError`` for
        all.
        """
        ...


class TeacherInfo(BaseModel):
    """What a client must know before it asks."""

    name: str
    top_k: int
    vocab_size: int
    temperature: float
    max_sequence_tokens: int
    head_dtype: Literal["float32", "model"]
    wire_version: Literal[1] = wire.VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``max_requests`` in flight, and ``max_body_bytes`` of one: what is beyond is refused
    with 503 and 413.
    """

    max_requests: int
    max_body_bytes: int

    @classmethod
    def of(cls, max_requests: int, info: TeacherInfo) -> "Limits":
        """Room for the longest sequence as JSON, with a space after every comma, and for what
        surrounds it.
        """
        bytes_per_id = len(f"{info.vocab_size}, ")
        return cls(
            max_requests=max_requests, max_body_bytes=1024 + bytes_per_id * info.max_sequence_tokens
        )


# JSON has one kind of number: 5.0 is 5. Text and truth values are no ids.
TokenId = Annotated[
    StrictInt, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)
]


class ScoreRequest(BaseModel):
    """A prompt and its response."""

    model_config = ConfigDict(extra="forbid")

    prompt_ids: list[TokenId]
    response_ids: list[TokenId]


class ScoreAnswer(BaseModel):
    """A signal in JSON: R numbers, or R lists of K, in nats. A tail is null where it has no
    mass.
    """

    teacher: str
    token_logprobs: list[float]
    entropy: list[float]
    topk_ids: list[list[int]]
    topk_logprobs: list[list[float]]
    tail_logprobs: list[float | None]

    @classmethod
    def of(cls, signal: TeacherSignal) -> "ScoreAnswer":
        """Every float32 becomes the decimal that reads back as it."""
        return cls(
            teacher=signal.teacher,
            token_logprobs=signal.token_logprobs.tolist(),
            entropy=cast(Exact, signal.entropy).entropy.tolist(),
            topk_ids=signal.topk_ids.tolist(),
            topk_logprobs=signal.topk_logprobs.tolist(),
            tail_logprobs=[
                None if math.isinf(tail) else tail for tail in signal.tail_logprobs.tolist()
            ],
        )


class Status(BaseModel):
    """The process's, or the engine's."""

    status: Literal["alive", "ready"]


class Refusal(BaseModel):
    """Why a request was not answered."""

    detail: str


class _Meters:
    """The server's metrics, in a registry of their own; every series carries the label
    ``teacher``.
    """

    def __init__(self, teacher: str) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = 0
        self._requests = Counter(
            "eopd_teacher_requests_total",
            "Requests to score, by status code; 499 where the client hung up.",
            ("teacher", "code"),
            registry=self.registry,
        )
        self.tokens = Counter(
            "eopd_teacher_scored_tokens_total",
            "Response tokens scored.",
            ("teacher",),
            registry=self.registry,
        ).labels(teacher)
        self._seconds = Histogram(
            "eopd_teacher_request_seconds",
            "Time of an answered request.",
            ("teacher",),
            buckets=_BUCKETS,
            registry=self.registry,
        ).labels(teacher)
        in_flight = Gauge(
            "eopd_teacher_in_flight_requests",
            "Requests being read or scored.",
            ("teacher",),
            registry=self.registry,
        )
        in_flight.labels(teacher).set_function(lambda: self.in_flight)
        self._teacher = teacher

    async def measure(self) -> AsyncIterator[None]:
        """A dependency that stands around one request."""
        self.in_flight += 1
        started, code = time.monotonic(), 500

        try:
            yield
            code = 200
            self._seconds.observe(time.monotonic() - started)
        except HTTPException as error:
            code = error.status_code
            raise
        finally:
            self.in_flight -= 1
            self._requests.labels(self._teacher, code).inc()


def create_app(
    scorer: ServedScorer, info: TeacherInfo, limits: Limits, token: str | None = None
) -> FastAPI:
    """The HTTP interface of one teacher; ``/openapi.json`` describes it.

    Args:
        scorer: scores; while it is not ready, it is not asked.
        info: told to clients, and what requests are checked against.
        limits: of load and size.
        token: what clients of ``/v1`` must bear; None lets everyone in.
    """
    app = FastAPI(title="eopd teacher", version=__version__, docs_url=None, redoc_url=None)
    meters = _Meters(info.name)
    guards = [] if token is None else [Depends(_bearer_of(token))]
    unauthorized = {} if token is None else _refusals(401)

    _add_probes(app, scorer, meters)

    @app.get("/v1/info", dependencies=guards, responses=unauthorized)
    async def teacher_info() -> TeacherInfo:
        """What this teacher is, and how long a sequence it takes."""
        return info

    @app.post(
        "/v1/score",
        dependencies=[Depends(meters.measure), *guards],
        response_model=ScoreAnswer,
        responses=_BINARY_ANSWER | unauthorized | _refusals(413, 415, 422, 500, 503),
        openapi_extra={"requestBody": _request_body(info)},
    )
    async def score(request: Request) -> ScoreAnswer | Response:
        """What the teacher says of every response token. The answer has the media type of the
        request.
        """
        if meters.in_flight > limits.max_requests:
            raise _busy(f"{limits.max_requests} requests are in flight, which is the limit")

        _require_ready(scorer)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in (_JSON, wire.MEDIA_TYPE):
            raise HTTPException(
                415, f"the body must be {_JSON} or {wire.MEDIA_TYPE} (is {media_type or 'untyped'})"
            )

        prompt_ids, response_ids = _parse(
            await _read(request, limits.max_body_bytes), media_type, info
        )
        signal = await _score(request, scorer.signal(prompt_ids, response_ids))
        meters.tokens.inc(len(response_ids))
        if media_type == _JSON:
            return ScoreAnswer.of(signal)

        return Response(wire.encode_answer(signal), media_type=wire.MEDIA_TYPE)

    return app


def _add_probes(app: FastAPI, scorer: ServedScorer, meters: "_Meters") -> None:
    """What machines ask of the process: whether it lives, whether it serves, and its metrics."""

    @app.get("/health")
    async def health() -> Status:
        """The process lives."""
        return Status(status="alive")

    @app.get("/ready", responses=_refusals(503))
    async def ready() -> Status:
        """The engine is up."""
        _require_ready(scorer)
        return Status(status="ready")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": _TEXT}}}},
    )
    async def metrics() -> Response:
        """For Prometheus to scrape."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)


_TEXT: Final = {"type": "string"}
_BINARY: Final = {
    "type": "string",
    "format": "binary",
    "description": "See docs/teacher-server.md.",
}
_BINARY_ANSWER: Final[dict[int | str, dict[str, object]]] = {
    200: {"content": {wire.MEDIA_TYPE: {"schema": _BINARY}}}
}
_REFUSALS: Final = {
    401: "No bearer token, or a wrong one.",
    413: "The body is too large.",
    415: "The body has another media type than the two.",
    422: "The body is not of the format, empty, too long, or outside the vocabulary.",
    500: "The teacher failed on this request.",
    503: "The engine is not up, or too many requests are in flight.",
}
_HEADERS: Final = {401: "WWW-Authenticate", 503: "Retry-After"}


def _refusals(*codes: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's description of what else may be answered."""
    described: dict[int | str, dict[str, object]] = {}
    for code in codes:
        described[code] = {"model": Refusal, "description": _REFUSALS[code]}
        if code in _HEADERS:
            described[code]["headers"] = {_HEADERS[code]: {"schema": _TEXT, "required": True}}

    return described


def _request_body(info: TeacherInfo) -> dict[str, object]:
    """OpenAPI's description of a request; it is written here since the endpoint reads the
    stream itself.
    """
    token_id = {"type": "integer", "minimum": 0, "maximum": info.vocab_size - 1}
    ids = {
        "type": "array",
        "items": token_id,
        "minItems": 1,
        "maxItems": info.max_sequence_tokens - 1,
    }
    names = list(ScoreRequest.model_fields)
    asked = {
        "type": "object",
        "properties": dict.fromkeys(names, ids),
        "required": names,
        "additionalProperties": False,
    }

    return {
        "required": True,
        "content": {_JSON: {"schema": asked}, wire.MEDIA_TYPE: {"schema": _BINARY}},
    }


def _bearer_of(token: str) -> Callable[..., Coroutine[object, object, None]]:
    scheme = HTTPBearer(auto_error=False)

    async def authorize(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)],
    ) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"}
            )

    return authorize


def _busy(detail: str) -> HTTPException:
    return HTTPException(503, detail, {"Retry-After": str(RETRY_AFTER_S)})


def _hung_up() -> HTTPException:
    """Nobody reads it; it is counted."""
    return HTTPException(499, "the client hung up")


def _require_ready(scorer: ServedScorer) -> None:
    if not scorer.ready:
        raise _busy("the engine is not up")


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body; what is too large is refused when that is known, whatever its header says."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                raise HTTPException(413, f"the body is larger than {max_bytes} bytes")
    except ClientDisconnect:
        raise _hung_up() from None

    return bytes(body)


def _parse(body: bytes, media_type: str, info: TeacherInfo) -> tuple[Int32Array, Int32Array]:
    """Body to checked token ids [P] and [R]."""
    ids: dict[str, npt.NDArray[np.object_] | Int32Array]
    try:
        if media_type == _JSON:
            asked = ScoreRequest.model_validate_json(body)
            # of any size: nothing wraps around
            ids = {name: np.array(value, object) for name, value in asked}
        else:
            ids = dict(zip(("prompt_ids", "response_ids"), wire.decode_request(body), strict=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise HTTPException(422, f"{where}: {first['msg']}") from None
    except wire.WireError as error:
        raise HTTPException(422, f"body: {error}") from None

    for name, values in ids.items():
        if not len(values):
            raise HTTPException(422, f"{name}: must not be empty")

        for extreme in (values.min(), values.max()):
            if not 0 <= extreme < info.vocab_size:
                raise HTTPException(
                    422, f"{name}: {extreme} is outside the vocabulary of {info.vocab_size} tokens"
                )

    if (length := sum(map(len, ids.values()))) > info.max_sequence_tokens:
        raise HTTPException(
            422, f"prompt and response are {length} tokens; the limit is {info.max_sequence_tokens}"
        )

    return ids["prompt_ids"].astype(np.int32), ids["response_ids"].astype(np.int32)


async def _score(
    request: Request, scoring: Coroutine[object, object, TeacherSignal]
) -> TeacherSignal:
    """Wait for the engine, and give the request up when its client hangs up: nobody would
    read the answer.
    """
    task = asyncio.ensure_future(scoring)
    # the body has been read: all that can come is the end
    hung_up = asyncio.ensure_future(request.receive())

    try:
        await asyncio.wait((task, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _hung_up()

        return await task
    except SignalError as error:
        raise HTTPException(500, str(error)) from error
    except TeacherDownError as error:
        raise _busy(str(error)) from error
    finally:
        task.cancel()
        hung_up.cancel()
