"""A served teacher as a process: its engine, uvicorn, and how both come and go.

Two tasks share the event loop:

* the engine's (``_Engine.keep``) starts it and watches it, and ends the server when it dies;
* uvicorn answers from the first moment on, ``/ready`` and ``/v1/score`` with 503 until the engine
is up.

SIGTERM or Ctrl-C: no new connections, requests in flight are finished, then the engine is stopped.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Final

import uvicorn

from eopd.config import ConfigError, TeacherConfig
from eopd.roles import TeacherDownError
from eopd.teacher.served.server import Limits, TeacherInfo, create_app
from eopd.tokenizer import vocab_size
from eopd.types import Int32Array, TeacherSignal

if TYPE_CHECKING:
    from eopd.teacher.vllm_scorer import VllmTeacherScorer

_WATCH_S: Final = 0.5
# longer than clients keep an idle connection, so that none is closed under a request
_KEEP_ALIVE_S: Final = 75

logger = logging.getLogger("uvicorn.error")  # one log for everything the process says


class _Engine:
    """A scorer that is not there at first, and may die."""

    def __init__(
        self, name: str, start: Callable[[], Coroutine[object, object, "VllmTeacherScorer"]]
    ) -> None:
        self._name = name
        self._start = start
        self._scorer: VllmTeacherScorer | None = None

    @property
    def ready(self) -> bool:
        """Whether it has started, and lives."""
        return self._scorer is not None and self._scorer.ready

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Score a response; see ``ServedScorer``."""
        if self._scorer is None:
            raise TeacherDownError(f"teacher {self._name}: its engine has not started")

        return await self._scorer.signal(prompt_ids, response_ids)

    async def keep(self, server: uvicorn.Server) -> None:
        """Start, watch, and end the server with the engine: a process without one is of no use.

        Raises:
            TeacherDownError: the engine died.
        """
        try:
            self._scorer = await self._start()
            logger.info("teacher %s is ready", self._name)
            while self._scorer.ready:
                await asyncio.sleep(_WATCH_S)

            raise TeacherDownError(
                f"teacher {self._name}: its engine died; what vLLM says of it is above"
            )
        finally:
            server.should_exit = True

    async def stop(self, keeping: "asyncio.Task[None]") -> None:
        """Stop the engine, also one that is being started; nothing is left running."""
        while self._scorer is None and not keeping.done():
            for process in multiprocessing.active_children():
                process.kill()  # until it is up, vLLM's process puts off every other signal

            await asyncio.wait((keeping,), timeout=_WATCH_S)

        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        if self._scorer is not None:
            await self._scorer.close()


class _Server(uvicorn.Server):
    """uvicorn, with signals left to ``_run``: after serving, an engine has to be stopped."""

    asked_to_stop = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop serving; a second Ctrl-C does not wait for requests in flight."""
        self.asked_to_stop = True
        super().handle_exit(sig, frame)

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Capture none."""
        return nullcontext()


def _info(config: TeacherConfig, top_k: int, max_sequence_tokens: int) -> TeacherInfo:
    return TeacherInfo(
        name=config.name,
        top_k=top_k,
        vocab_size=vocab_size(config.model),
        temperature=config.temperature,
        max_sequence_tokens=max_sequence_tokens,
        head_dtype=config.head_dtype,
    )


def serve(
    config: TeacherConfig,
    *,
    top_k: int,
    max_sequence_tokens: int,
    host: str,
    port: int,
    token: str | None,
    max_requests: int,
) -> None:
    """Serve a teacher until SIGTERM or Ctrl-C.

    Args:
        config: the teacher, whose engine runs here.
        top_k: K, candidates per response token.
        max_sequence_tokens: the longest prompt and response together.
        host: the address to listen on.
        port: 0 takes a free one, which the log names.
        token: what clients must bear; None lets everyone in who reaches the address.
        max_requests: how many may be in flight.

    Raises:
        ConfigError: the address cannot be served, or the model's directory is no model.
        TeacherDownError: the engine died.
    """
    info = _info(config, top_k, max_sequence_tokens)
    # A forked engine would inherit the server's sockets and threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    with listen(host, port) as listener:
        # takes seconds: a mistaken address is told before
        from eopd.teacher.vllm_scorer import VllmTeacherScorer

        engine = _Engine(
            config.name,
            lambda: VllmTeacherScorer.start(
                config, top_k=top_k, max_sequence_tokens=max_sequence_tokens
            ),
        )
        settings = uvicorn.Config(
            create_app(engine, info, Limits.of(max_requests, info), token),
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            # no client of ours waits any longer
            timeout_graceful_shutdown=math.ceil(config.timeout_s),
        )
        address = "[{}]:{}" if ":" in host else "{}:{}"
        logger.info(
            "teacher %s is served at http://%s",
            config.name,
            address.format(*listener.getsockname()),
        )
        asyncio.run(_run(_Server(settings), engine, listener))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be served ({error.strerror})"
        ) from None


async def _run(server: _Server, engine: _Engine, listener: socket.socket) -> None:
    """Serve until a signal comes, or until the engine fails, whose error is raised.

    Ctrl-C in a terminal reaches vLLM's processes too: what they say once a stop was asked for is no
    failure.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)

    keeping = asyncio.create_task(engine.keep(server))
    await server.serve(sockets=[listener])
    await engine.stop(keeping)
    if not server.asked_to_stop:
        await keeping
