"""``eopd eval --like RUN`` asks and writes as a run does, so that the scores are of what was trained."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import typer

from eopd.config import Config, ConfigError
from eopd.config.document import show, write_tree

# The settings that change what a model is asked, or how its answers are drawn.
_ASKED: Final = (
    "template",
    "template_options",
    "system",
    "suffix",
    "temperature",
    "max_response_tokens",
)


def _take_settings(context: typer.Context, run: Path | None) -> Path | None:
    """Makes the settings of a run the defaults of the options that follow."""
    if run is not None:
        settings = settings_of(_config_of(run))
        context.default_map = settings | {
            "template_options": write_tree(settings["template_options"]),
            "vllm": [write_tree(settings["vllm"])],
        }

    return run


def over_those_of_the_run(
    context: typer.Context, given: Sequence[str] | None
) -> Sequence[str] | None:
    """Puts vLLM's options of the run before those that are given, which win key by key."""
    of_run = (context.default_map or {}).get("vllm", [])
    return [*of_run, *(given or [])]


Like = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        is_eager=True,
        callback=_take_settings,
        help="A run directory, whose settings are the defaults of --template, --template-options, "
        "--system, --suffix, --max-prompt-tokens, --temperature, --max-response-tokens, --engines, "
        "--threads, --gpus, --timeout, --vllm and --dtype.",
    ),
]


def settings_of(config: Config) -> dict[str, object]:
    """Returns what a run has in common with ``eopd eval``, by the names of the options."""
    prompts, rollout = config.prompts, config.rollout
    return {
        "template": prompts.template,
        "template_options": prompts.template_options,
        "system": prompts.system,
        "suffix": prompts.suffix,
        "max_prompt_tokens": prompts.max_tokens,
        "temperature": rollout.temperature,
        "max_response_tokens": rollout.max_response_tokens,
        "engines": rollout.engines,
        "threads": rollout.threads,
        "gpus": rollout.gpus,
        "timeout": rollout.timeout_s,
        "vllm": rollout.vllm,
        "dtype": config.student.dtype,
    }


def note_of_others(model: str, settings: Mapping[str, object]) -> str | None:
    """Returns a note where a model lies in a run that asked or wrote otherwise than ``settings``."""
    path = Path(model)
    for run in (path.absolute().parent, path.resolve().parent):
        with suppress(ConfigError):
            trained = settings_of(_config_of(run))
            others = [
                f"{name} {show(trained[name])} (here {show(settings[name])})"
                for name in _ASKED
                if trained[name] != settings[name]
            ]
            had = ", ".join(others)
            return had and f"the run that wrote it had {had}; --like {run} takes its settings"

    return None


def _config_of(run: Path) -> Config:
    from eopd.run.directory import RunDirectory

    return RunDirectory(run).config()
