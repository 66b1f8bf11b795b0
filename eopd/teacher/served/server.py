"""vLLM's own server for a teacher of a run's config, in this process.

It is started with the options of the teacher's engine, and with the plugin that adds our routes.
Checked against vLLM 0.32.0: ``entrypoints/launchers/api_server/entry.py``, whose arguments hold the
engine's options by their names in ``AsyncEngineArgs``.
"""

import asyncio
import math
import multiprocessing
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from eopd.config import ConfigError, TeacherConfig
from eopd.hub import model_directory
from eopd.roles import TeacherDownError
from eopd.telemetry.discovery import announced
from eopd.tokenizer import has_tokenizer

# longer than clients keep an idle connection, so that none is closed under a request
_KEEP_ALIVE_S: Final = 75
# for bodies that are still being sent, once all requests are answered and the engine has ended
_CLOSE_S: Final = 30
# What may be set for the server; an engine is set up by the config, and the token by its variable.
_OPTIONS: Final = frozenset(
    {
        *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"),
        *("enable_ssl_refresh", "allowed_origins", "allowed_methods", "allowed_headers"),
        *("allow_credentials", "uvicorn_log_level", "log_config_file"),
        *("h11_max_incomplete_event_size", "h11_max_header_count"),
    }
)


def serve(
    config: TeacherConfig,
    *,
    top_k: int,
    max_sequence_tokens: int,
    host: str,
    port: int,
    token: str | None,
    options: Sequence[str],
    say: Callable[[str], None],
    discovery: Path | None = None,
) -> None:
    """Serves a teacher until SIGTERM or Ctrl-C.

    Args:
        config: the teacher, whose engine runs here.
        top_k: K, candidates per response token.
        max_sequence_tokens: the longest prompt and response together.
        host: the address to listen on.
        port: 0 takes a free one.
        token: what clients must bear; None admits everybody who reaches the address.
        options: more options of vLLM's server, as on the command line of ``vllm serve``: TLS,
            CORS, limits of headers, logs.
        say: is told the address.
        discovery: the folder in which Prometheus is told the address (``telemetry.discovery``).

    Raises:
        ConfigError: the address cannot be served, an option is not for this server, or the model's
            directory is no model.
        TeacherDownError: the engine died.
    """
    with bind(host, port) as listener, ExitStack() as told:
        scheme = "https" if any("--ssl-certfile" in option for option in options) else "http"
        name = f"[{host}]" if ":" in host else host
        address = f"{scheme}://{name}:{listener.getsockname()[1]}"
        say(f"starting teacher {config.name}, which will be served at {address}")

        # Before the imports, which read it, and which take seconds.
        os.environ |= _environment(token)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _end_start(told))

        from vllm.entrypoints.launchers.api_server.entry import run_server_worker

        from eopd.teacher.served.plugin import ScoringRoutes
        from eopd.teacher.vllm_scorer import engine_options

        settings = engine_options(config, top_k=top_k, max_sequence_tokens=max_sequence_tokens)
        settings |= _server_settings(config, host, listener.getsockname()[1])
        ScoringRoutes.engine_died = None
        arguments = _arguments(settings, options)
        told.enter_context(_told(discovery, config.name, address))
        asyncio.run(
            run_server_worker(address, listener, arguments, timeout_graceful_shutdown=_CLOSE_S)
        )
        if ScoringRoutes.engine_died:
            raise TeacherDownError(
                f"teacher {config.name}: its engine died; what vLLM says of it is above"
            )


def _told(discovery: Path | None, name: str, address: str) -> AbstractContextManager[None]:
    """Returns a block in which Prometheus knows a teacher, which answers once its engine is up."""
    scheme, _, target = address.partition("://")
    identity = Path(f"teacher-{name}-{target.rpartition(':')[2]}")
    labels = {"teacher": name, "__scheme__": scheme}
    return announced(discovery, target, identity, labels)


def _server_settings(config: TeacherConfig, host: str, port: int) -> dict[str, object]:
    return {
        "host": host,
        "port": port,
        "served_model_name": [config.name],
        "shutdown_timeout": math.ceil(config.timeout_s),
        "disable_uvicorn_access_log": True,
        "disable_log_stats": False,
        "skip_tokenizer_init": not has_tokenizer(
            model_directory(config.model)
        ),  # vLLM prints its failure
    }


def _arguments(settings: Mapping[str, object], options: Sequence[str]) -> Namespace:
    """Returns what ``vllm serve`` makes of a command line with ``options``, with ``settings`` set."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import set_ulimit

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments: Namespace = parser.parse_args(list(options))
    defaults = vars(parser.parse_args([]))
    for name, value in vars(arguments).items():
        if value != defaults[name] and name not in _OPTIONS:
            option = name.replace("_", "-")
            raise ConfigError(
                f"{'an argument' if name == 'model_tag' else f'--{option}'} behind --: is not for "
                "the server of a teacher; the options of its engine stand in teachers[].vllm"
            )

    for name, value in settings.items():
        setattr(arguments, name, value)

    validate_parsed_serve_args(arguments)
    set_ulimit()  # for many connections

    return arguments


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that holds an address, but does not listen yet: until the engine is up,
    clients are refused and try again.

    Raises:
        ConfigError: somebody listens there, or it is no address of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot be served ({error.strerror})"
        ) from None

    return listener


def _end_start(told: ExitStack) -> None:
    """Ends a process whose engine is being started, and the engine with it; Prometheus is told no
    more of it.

    Nobody is served yet. An exception would not do: vLLM may lose it, or wait for an engine that a
    Ctrl-C has ended. Once it serves, its server takes the signals.
    """
    for process in multiprocessing.active_children():
        process.kill()

    try:
        told.close()
    finally:
        os._exit(0)


def _environment(token: str | None) -> dict[str, str]:
    """Returns the environment of vLLM's server. The token is not among its arguments, which every
    user of the machine can read.
    """
    environment = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(_KEEP_ALIVE_S),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # routes that need no token
    }
    return environment if token is None else environment | {"VLLM_API_KEY": token}
