"""The names of a config are looked up once, before its run: from then on they are commits, on every
node and after every restart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eopd.config import BenchmarkConfig, Config, ConfigError, Part
from eopd.config.names import ModelName
from eopd.config.prompts import keys_of
from eopd.hub import find_commit, model_directory
from eopd.prompts.named import pin_data

__all__ = ["key_of_benchmark", "pin_model", "pin_parts", "pinned", "specs"]

Specs = Mapping[str, str]


def pinned(config: Config, before: Config | None = None) -> Config:
    """Returns the config with the commit behind the name of every model and data set, whose models
    are in the cache of this machine.

    Args:
        config: the config of a run.
        before: the config of the run that goes on, if one does. A name without a revision keeps the
            commit that the run began with, wherever its branch has moved.

    Raises:
        ConfigError: the Hub does not show a model or a data set, or cannot be reached and the cache
            does not have it.
    """
    known = {} if before is None else specs(before)
    student = pin_model("student.model", config.student.model, known, weights=True)
    teachers = tuple(
        teacher.model_copy(
            update={
                "model": pin_model(
                    f"teachers.{teacher.name}.model",
                    teacher.model,
                    known,
                    weights=teacher.backend == "vllm",
                )
            }
        )
        for teacher in config.teachers
    )
    prompts = config.prompts
    data = {
        "data": pin_parts("prompts.data", prompts.data, known),
        "held_out": pin_parts("prompts.held_out", prompts.held_out, known),
    }
    benchmarks = tuple(
        benchmark.model_copy(
            update={"data": pin_parts(key_of_benchmark(benchmark), benchmark.data, known)}
        )
        for benchmark in config.evaluation.benchmarks
    )
    return config.model_copy(
        update={
            "student": config.student.model_copy(update={"model": student}),
            "teachers": teachers,
            "prompts": prompts.model_copy(update=data),
            "evaluation": config.evaluation.model_copy(update={"benchmarks": benchmarks}),
        }
    )


def pin_parts(key: str, parts: Sequence[Part], before: Specs) -> tuple[Part, ...]:
    """Returns the parts of the data with the commits behind their names; see ``pin_data``."""
    pinned_parts = []
    for key_of_part, part in zip(keys_of(key, parts), parts, strict=True):
        if part.data is not None:
            data = pin_data(key_of_part, part.data, before)
            part = part.model_copy(update={"data": data})

        pinned_parts.append(part)

    return tuple(pinned_parts)


def key_of_benchmark(benchmark: BenchmarkConfig) -> str:
    """Returns the key of a benchmark's data, for messages."""
    return f"evaluation.benchmarks.{benchmark.name}.data"


def specs(config: Config) -> dict[str, str]:
    """Returns what stands at the keys of models and data, teachers by name."""
    models = {f"teachers.{teacher.name}.model": teacher.model for teacher in config.teachers}
    data: dict[str, str] = {}
    for key, parts in (
        ("prompts.data", config.prompts.data),
        ("prompts.held_out", config.prompts.held_out),
        *(
            (key_of_benchmark(benchmark), benchmark.data)
            for benchmark in config.evaluation.benchmarks
        ),
    ):
        data |= {
            key_of_part: part.data
            for key_of_part, part in zip(keys_of(key, parts), parts, strict=True)
            if part.data is not None
        }

    return models | data | {"student.model": config.student.model}


def pin_model(key: str, spec: str, before: Specs, *, weights: bool) -> str:
    """Returns the spec of a model with the commit behind its revision, and downloads it; that of a
    directory as it is.

    Args:
        key: the key of the config, for messages.
        spec: what stands there.
        before: the specs of the run that goes on, by their keys.
        weights: whether the weights are needed here.

    Raises:
        ConfigError: the Hub does not show it, or cannot be reached and the cache does not have it.
    """
    name = ModelName.parse(spec)
    if name is None:
        return spec

    began = ModelName.parse(before.get(key, ""))
    if name.revision is None and began and began.repository == name.repository:
        name = began

    try:
        commit = find_commit("model", name.repository, name.revision, spec)
        found = str(replace(name, revision=commit))
        model_directory(found, weights=weights)
    except ConfigError as error:
        other = "" if name.revision else f"; nor is there a directory {Path.cwd() / spec}"
        raise ConfigError(f"{key}: {error}{other}") from None

    return found
