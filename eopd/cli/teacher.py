"""``eopd teacher``: a teacher of a run's config as a server of its own."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer

from eopd.config import ConfigError, TeacherConfig, load_config

teacher = typer.Typer(no_args_is_help=True, help="Serve a teacher to other clusters.")


@teacher.callback()
def _teacher() -> None:
    """Keeps ``serve`` a verb of its own, although it is the only one."""


@teacher.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="The YAML file of a run; its students may live elsewhere.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: section.key=value.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--teacher", help="Which of its teachers; else the first.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8400,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the bearer token.")
    ] = None,
) -> None:
    """Offer a teacher's exact scores over HTTP, until Ctrl-C or SIGTERM. What follows after ``--``
    are options of vLLM's server.
    """
    run = load_config(config, overrides or [])
    chosen = _choose(run.teachers, name)
    token = token_for(api_key_env, host)
    from eopd.hub import model_directory
    from eopd.preflight import pin_model, require_model, require_served, require_top_k
    from eopd.preflight.environment import require_packages
    from eopd.roles import TeacherDownError
    from eopd.runtime.placement import vllm_env
    from eopd.runtime.process import clean_environment
    from eopd.teacher.served import server

    key, longest = f"teachers.{chosen.name}.model", run.max_teacher_tokens(chosen)
    model = pin_model(key, chosen.model, {}, weights=True)
    chosen, directory = chosen.model_copy(update={"model": model}), model_directory(model)
    require_model(key, directory, num_tokens=longest, tokenizer=False)
    require_served(key, directory)
    require_top_k(run.loss.top_k, chosen.model, directory)

    require_packages()
    clean_environment(os.environ)
    os.environ |= vllm_env(chosen.threads)

    try:
        server.serve(
            chosen,
            top_k=run.loss.top_k,
            max_sequence_tokens=longest,
            host=host,
            port=port,
            token=token,
            options=context.args,
            say=typer.echo,
            discovery=run.telemetry.discovery,
        )
    except TeacherDownError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _choose(teachers: tuple[TeacherConfig, ...], name: str | None) -> TeacherConfig:
    named = {teacher.name: teacher for teacher in teachers}
    if name is not None and name not in named:
        raise ConfigError(
            f"--teacher {name}: there is no such teacher; there is {', '.join(named)}"
        )

    chosen = teachers[0] if name is None else named[name]
    if chosen.backend != "vllm":
        raise ConfigError(
            f"teachers.{chosen.name}.backend: is {chosen.backend}, served "
            "already; here it must be vllm"
        )

    return chosen


def token_for(variable: str | None, host: str) -> str | None:
    """The token in the environment; without one, nobody outside this machine is let in."""
    if variable is not None:
        token = os.environ.get(variable)
        if token is None:
            raise ConfigError(f"--api-key-env {variable}: there is no such environment variable")

        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"--api-key-env {variable}: must hold a token of printable ASCII, without spaces"
            )

        return token

    if not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: needs --api-key-env; without a token only this machine is served"
        )

    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
