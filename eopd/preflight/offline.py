"""A config is checked as far as this machine can tell, without network and without weights.

In: a config. Out: a line for each thing that was checked, and for each that is not here and was
not; a mistake is one ``ConfigError``. Of a model that is not here nothing is checked. One of which
only ``config.json`` is here, as in a cache that was filled with that alone, is checked by its
numbers. What is here as a whole is read as ``inputs.py`` reads it. Left out: the machine, since the
run will have another one (``environment.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

from eopd.config import Config, ConfigError, Part, TeacherConfig
from eopd.config.choices import choice_notes
from eopd.config.prompts import PromptsConfig, keys_of
from eopd.hub import cached_directory
from eopd.preflight.environment import cluster_address
from eopd.preflight.functions import require_functions
from eopd.preflight.inputs import (
    load_benchmark,
    load_held_out,
    load_train,
    require_as_student,
    require_as_teacher,
    require_native_options,
    shared_vocabulary,
)
from eopd.preflight.models import require_top_k
from eopd.preflight.pinning import key_of_benchmark
from eopd.preflight.report import oddities
from eopd.preflight.weights import has_weights
from eopd.prompts import PromptSet
from eopd.prompts.files import read_part
from eopd.prompts.named import cached_data
from eopd.prompts.rows import read_question
from eopd.tokenizer import has_tokenizer, load_tokenizer, read_json, vocab_size

_NOT_CHECKED: Final = "not here: not checked"
_FACTS: Final = {  # what is told of a ``config.json``, and the key that has it
    "positions": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key-value heads": "num_key_value_heads",
}


def check_offline(config: Config) -> list[str]:
    """Checks all of a config that needs neither a network nor weights.

    Returns:
        What was checked and what is not here, a line each.

    Raises:
        ConfigError: something is wrong, as in ``prepare``.
    """
    cluster_address(config.cluster)
    require_native_options(config)
    lines = [
        f"{name}: its options are {_NOT_CHECKED}"
        for name in ("vllm", "deepspeed")
        if find_spec(name) is None
    ]

    student = _Model.find("student.model", config.student.model)
    if student.directory is not None:
        require_as_student(
            config, student.directory, weights=student.weights, tokenizer=student.tokenizer
        )
        require_top_k(config.loss.top_k, student.spec, student.directory)

    lines.append(student.told())

    teachers = {teacher.name: _teacher(teacher) for teacher in config.teachers}
    for teacher in config.teachers:
        _check_teacher(config, teacher, student, teachers[teacher.name])
        lines.append(teachers[teacher.name].told())

    readers = [teachers[one.name] for one in config.teachers if one.template is not None]
    can_render = all(model.tokenizer for model in (student, *readers))
    lines += _check_data(_with_directories(config, student, teachers), can_render=can_render)
    lines += choice_notes(config)

    return [*lines, *(f"note: {oddity}" for oddity in oddities(config))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is here of a model: its directory, a tokenizer in it, and weights."""

    key: str
    spec: str
    directory: Path | None
    tokenizer: bool
    weights: bool

    @classmethod
    def find(cls, key: str, spec: str) -> Self:
        directory = cached_directory(spec)
        is_whole = directory is not None and cached_directory(spec, weights=True) is not None
        return cls(
            key=key,
            spec=spec,
            directory=directory,
            tokenizer=directory is not None and has_tokenizer(directory),
            weights=is_whole and directory is not None and has_weights(directory),
        )

    def told(self) -> str:
        """Says what the model is, and what is not here of it."""
        if self.directory is None:
            return f"{self.key}: {self.spec} is {_NOT_CHECKED}"

        config = read_json(self.directory / "config.json")
        rows = f"{vocab_size(self.directory)} rows"
        facts = [rows, *(f"{config[key]} {name}" for name, key in _FACTS.items() if key in config)]
        text = f"{self.key}: {self.spec} has {', '.join(facts)}"
        missing = [name for name in ("tokenizer", "weights") if not getattr(self, name)]

        return f"{text}; {' and '.join(missing)} {_NOT_CHECKED}" if missing else text


def _teacher(teacher: TeacherConfig) -> _Model:
    return _Model.find(f"teachers.{teacher.name}.model", teacher.model)


def _check_teacher(config: Config, teacher: TeacherConfig, student: _Model, model: _Model) -> None:
    if model.directory is None:
        return

    require_as_teacher(
        config, teacher, model.directory, weights=model.weights, tokenizer=model.tokenizer
    )
    require_top_k(config.loss.top_k, model.spec, model.directory)
    _require_rows(teacher, student, model)
    if student.directory is not None and student.tokenizer and model.tokenizer:
        shared_vocabulary(config, student.directory, teacher, model.directory)


def _require_rows(teacher: TeacherConfig, student: _Model, model: _Model) -> None:
    """Checks that the heads have the tokens of ``eos_remap``."""
    for ids, owner in ((teacher.eos_remap.keys(), student), (teacher.eos_remap.values(), model)):
        rows = None if owner.directory is None else vocab_size(owner.directory)
        if rows is not None and (beyond := [token for token in ids if not 0 <= token < rows]):
            raise ConfigError(
                f"teachers.{teacher.name}.eos_remap: {beyond[0]} is no token of {owner.spec}, "
                f"whose head has {rows} rows"
            )


def _with_directories(config: Config, student: _Model, teachers: dict[str, _Model]) -> Config:
    """Returns the config with the directories of the models that are here in the place of names."""
    named = tuple(
        teacher.model_copy(update={"model": str(teachers[teacher.name].directory or teacher.model)})
        for teacher in config.teachers
    )
    model = str(student.directory or config.student.model)
    learner = config.student.model_copy(update={"model": model})
    return config.model_copy(update={"student": learner, "teachers": named})


@dataclass(frozen=True, slots=True)
class _Rows:
    """The parts of a set of rows that are here, by their keys, and the lines on those that are not."""

    key: str
    parts: dict[str, Part]
    missing: list[str]

    @classmethod
    def find(cls, key: str, parts: Sequence[Part]) -> Self:
        rows = cls(key, {}, [])
        for key_of_part, part in zip(keys_of(key, parts), parts, strict=True):
            spec = part.data if part.data is None else cached_data(key_of_part, part.data)
            if spec is None and part.function is None:
                rows.missing.append(f"{key_of_part}: {part.name} is {_NOT_CHECKED}")
            else:
                rows.parts[key_of_part] = part.model_copy(update={"data": spec})

        return rows

    @property
    def here(self) -> tuple[Part, ...]:
        """The parts that are here."""
        return tuple(self.parts.values())

    def told(self, prompts: PromptsConfig, loaded: PromptSet | None) -> Iterator[str]:
        """Says what is here and what is not. Rows that were not loaded as prompts are read here.

        Raises:
            ConfigError: a row is malformed.
        """
        yield from self.missing
        if loaded is not None:
            yield f"{self.key}: {len(loaded.prompts)} prompts"
            return

        for key, part in self.parts.items():
            rows = read_part(part, key, prompts.columns)
            for row in rows:
                read_question(row, prompts.suffix, prompts.system)

            yield f"{key}: {len(rows)} rows, not rendered: a part or a tokenizer is not here"


def _check_data(config: Config, *, can_render: bool) -> Iterator[str]:
    """Checks the rows that are here: as prompts where all of a set are and ``can_render``, else as
    rows.
    """
    data = _Rows.find("prompts.data", config.prompts.data)
    held_out = _Rows.find("prompts.held_out", config.prompts.held_out)
    prompts = config.prompts.model_copy(update={"data": data.here, "held_out": held_out.here})
    local = config.model_copy(update={"prompts": prompts})
    tokenizer = load_tokenizer(Path(config.student.model)) if can_render else None

    train = load_train(local, tokenizer) if tokenizer and not data.missing else None
    yield from data.told(prompts, train)
    if train is not None:
        require_functions(local, train)
    elif config.functions:
        yield f"{', '.join(config.functions)}: not tried, without prompts"

    measured = load_held_out(local, tokenizer) if tokenizer and not held_out.missing else None
    yield from held_out.told(prompts, measured)

    for benchmark in config.evaluation.benchmarks:
        rows = _Rows.find(key_of_benchmark(benchmark), benchmark.data)
        named = benchmark.model_copy(update={"data": rows.here})
        asked = load_benchmark(local, named, tokenizer) if tokenizer and not rows.missing else None
        columns = benchmark.columns or prompts.columns
        yield from rows.told(prompts.model_copy(update={"columns": columns}), asked)
