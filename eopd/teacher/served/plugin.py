"""The routes of a teacher inside ``vllm serve``: a plugin of its HTTP server.

vLLM brings the server: TLS, the bearer token, health, metrics, an end without lost requests. The
plugin adds the two routes of ``wire.py``, over an engine that has the scoring head. vLLM loads it
where ``VLLM_PLUGINS`` names it, as ``eopd teacher serve`` does.

Checked against vLLM 0.32.0: ``plugins/endpoint_plugins/interface.py``, and ``with_cancellation``,
which gives a request up when its client hangs up.
"""

import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Annotated, Any, cast

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from eopd.roles import TeacherDownError
from eopd.teacher import head
from eopd.teacher.served import wire
from eopd.teacher.served.wire import ScoreRequest, TeacherInfo
from eopd.teacher.signal import SignalError
from eopd.teacher.vllm_scorer import ScoringEngine
from eopd.types import TeacherSignal

_POLL_S = 0.05

router = APIRouter()

# of vLLM's own server: what machines ask of the process, and what it describes of itself
_KEPT_PATHS = frozenset({"/health", "/metrics", "/version", "/openapi.json"})


class ServedTeacher:
    """An engine that scores, and what its clients must know of it."""

    def __init__(self, engine: ScoringEngine, info: TeacherInfo) -> None:
        self.info = info
        self._engine = engine
        self._in_flight = 0
        self._ending = False

    async def score(self, request: ScoreRequest) -> TeacherSignal:
        """Returns the teacher's signal for every response token.

        Raises:
            HTTPException: 422 for a request that no teacher of this size can score, 500 where this
                one failed, 503 where the engine died or the server is ending.
        """
        self._require_fit(request)
        self._in_flight += 1  # before the question: ``finish`` asks the other way round

        try:
            if self._ending:
                raise HTTPException(503, "the server is ending")

            prompt_ids = np.array(request.prompt_ids, np.int32)
            response_ids = np.array(request.response_ids, np.int32)
            return await self._engine.signal(prompt_ids, response_ids)
        except SignalError as error:
            raise HTTPException(500, str(error)) from error
        except TeacherDownError as error:
            raise HTTPException(503, str(error)) from error
        finally:
            self._in_flight -= 1

    def finish(self, timeout_s: float) -> float:
        """Refuses new requests, and waits until those in flight are answered, in a thread beside
        the event loop; returns what is left of the time.
        """
        self._ending = True
        deadline = time.monotonic() + timeout_s
        while self._in_flight and time.monotonic() < deadline:
            time.sleep(_POLL_S)

        return max(0.0, deadline - time.monotonic())

    def _require_fit(self, request: ScoreRequest) -> None:
        ids = [*request.prompt_ids, *request.response_ids]
        if max(ids) >= self.info.vocab_size:
            raise HTTPException(
                422, f"token id {max(ids)}: the vocabulary has {self.info.vocab_size} tokens"
            )

        if len(ids) > self.info.max_sequence_tokens:
            raise HTTPException(
                422,
                f"prompt and response are {len(ids)} tokens; the limit is "
                f"{self.info.max_sequence_tokens}",
            )


def _teacher(request: Request) -> ServedTeacher:
    return cast(ServedTeacher, request.app.state.eopd_teacher)


Teacher = Annotated[ServedTeacher, Depends(_teacher)]


@router.get(wire.INFO_PATH)
async def info(teacher: Teacher) -> TeacherInfo:
    """Says what this teacher is, and how long a sequence it takes."""
    return teacher.info


@router.post(
    wire.SCORE_PATH,
    response_class=Response,
    responses={
        200: {"content": {wire.MEDIA_TYPE: {}}, "description": "See docs/teacher-server.md"}
    },
)
@with_cancellation  # type: ignore[untyped-decorator]
async def score(request: ScoreRequest, raw_request: Request, teacher: Teacher) -> Response:
    """Scores a response: the answer has what the teacher says of every token, as safetensors."""
    signal = await teacher.score(request)
    return Response(wire.encode_answer(signal), media_type=wire.MEDIA_TYPE)


class ScoringRoutes:
    """vLLM's ``EndpointPlugin`` for a server whose engine has the scoring head."""

    name = "eopd"
    required_tasks = (head.TASK,)
    engine_died: bool | None = None  # whether this process's did, before it was asked to end

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and takes away those that answer without the token or of other things
        than teaching: vLLM asks for the token below ``/v1`` alone.
        """
        app.router.routes[:] = [
            route for route in app.routes if getattr(route, "path", None) in _KEPT_PATHS
        ]
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient, state: State, args: Namespace) -> None:
        """Checks that the engine scores as it should, before anybody is answered.

        Raises:
            TeacherSelfTestError: it scores at another temperature than it was asked for.
        """
        config = engine_client.vllm_config
        options = cast(Mapping[str, Any], config.additional_config)[head.OPTIONS]
        top_k, temperature = int(options["top_k"]), float(options["temperature"])
        name = str(config.model_config.served_model_name)
        engine = ScoringEngine(engine_client, name, top_k=top_k, temperature=temperature)
        longest = int(config.model_config.max_model_len)
        await engine.check(longest)
        info = TeacherInfo(
            name=name,
            top_k=top_k,
            vocab_size=engine.vocab_size,
            temperature=temperature,
            max_sequence_tokens=longest,
        )
        state.eopd_teacher = ServedTeacher(engine, info)
        _end_softly(engine_client, state.eopd_teacher)


def _end_softly(engine: EngineClient, teacher: ServedTeacher) -> None:
    """Lets the engine end when all requests are answered, and notes whether it was dead before.

    vLLM's server asks the engine to end on SIGTERM, from a thread beside the event loop, and where
    the engine died. An engine alone would finish what it has read, and lose what is on its way to
    it; and the server ends without an error both ways.
    """
    shutdown = engine.shutdown

    def end(timeout: float | None = None) -> None:
        if ScoringRoutes.engine_died is None:
            ScoringRoutes.engine_died = engine.errored
            if not engine.errored:
                timeout = teacher.finish(timeout or 0.0)

        shutdown(timeout)

    engine.shutdown = end
