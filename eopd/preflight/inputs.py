"""What is checked before any worker starts: models, vocabularies, prompts. Every failure is
one ``ConfigError``.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from eopd.config import Config, ConfigError, TeacherConfig
from eopd.config.base import DATA_SUFFIXES
from eopd.preflight.answers import require_answers, require_readable_answers
from eopd.preflight.environment import require_environment
from eopd.preflight.models import require_model, require_served, require_student
from eopd.preflight.options import require_deepspeed_options, require_vllm_options
from eopd.prompts import PromptSet, TeacherView
from eopd.remember import remembered
from eopd.teacher.vocabulary import SharedVocabulary, require_same_vocabulary
from eopd.telemetry.trackers import require_trackers
from eopd.tokenizer import load_tokenizer
from eopd.types import PromptSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The checked inputs of a run; ``vocabularies`` by name of the teacher."""

    train: PromptSet
    held_out: PromptSet
    vocabularies: Mapping[str, SharedVocabulary]


def check(config: Config) -> Prepared:
    """Check a run's inputs and load its prompts; what was checked before, and is the same still, is
    remembered.

    Raises:
        ConfigError: a model directory or data file is missing, vocabularies or end tokens differ,
            top_k is larger than a vocabulary, vLLM or DeepSpeed take no such option, the student
            has no such layers to adapt, prompts do not fit or have no teacher, a verifier has no
            answers, a tracker cannot be used, a server's key is not set, or the machine will not do
            (``environment.py``).
    """
    require_environment(config)
    require_trackers(config.telemetry.trackers)
    require_vllm_options("rollout.vllm", config.rollout.vllm)
    require_deepspeed_options("learner.deepspeed", config.learner.deepspeed)
    for teacher in config.teachers:
        require_vllm_options(f"teachers.{teacher.name}.vllm", teacher.vllm)

    if unset := _keys_not_set(config):
        raise ConfigError(
            "\n".join(
                f"{where}: the environment variable {name} is not set" for where, name in unset
            )
        )

    data = [Path(spec) for spec in (config.prompts.data, config.prompts.held_out)]
    # a data set by name may change without a sign here
    if not all(path.suffix in DATA_SUFFIXES for path in data):
        return _check(config)

    models = {config.student.model, *(teacher.model for teacher in config.teachers)}
    # One by one, as they are asked for: a directory that cannot be read is told of by the check,
    # under its key.
    files = (
        file
        for model in models
        for name in ("*", "additional_chat_templates/*")
        for file in model.glob(name)
    )
    question = config.model_dump_json(exclude={"run", "cluster", "telemetry", "checkpoint"})

    return remembered(question, chain(data, files), lambda: _check(config))


def runs_here(config: Config) -> bool:
    """Whether the run starts Ray on this machine, rather than join a cluster of others."""
    return (config.cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def _keys_not_set(config: Config) -> list[tuple[str, str]]:
    """Keys of servers that a run on this machine would miss, with the variables that should hold
    them.

    They are read where the teacher's client runs: on a cluster that is another node, which has its
    own variables.
    """
    if not runs_here(config):
        return []

    named = [
        (teacher.name, teacher.server.api_key_env) for teacher in config.teachers if teacher.server
    ]
    unset = [
        (name, variable)
        for name, variable in named
        if variable and not os.environ.get(variable, "").strip()
    ]

    return [(f"teachers.{name}.server.api_key_env", variable) for name, variable in unset]


def _check(config: Config) -> Prepared:
    require_model("student.model", config.student.model, num_tokens=config.max_sequence_tokens)
    require_student(config)
    vocabularies = {teacher.name: _check_teacher(config, teacher) for teacher in config.teachers}
    if config.student.lora is not None:
        from eopd.learner.lora import check_targets

        check_targets(config.student.model, config.student.lora)

    tokenizer = load_tokenizer(config.student.model)
    train = PromptSet.load(config.prompts.data, config.prompts, tokenizer, _views(config))
    if config.loss.reward is not None:
        require_answers(train)
        require_readable_answers(train, config.loss.reward.grader)

    held_out = PromptSet.load(
        config.prompts.held_out, config.prompts, tokenizer, _views(config), key="prompts.held_out"
    )
    for where, data in ((config.prompts.data, train), (config.prompts.held_out, held_out)):
        count_prompts(where, data.prompts, config)

    return Prepared(train=train, held_out=held_out, vocabularies=vocabularies)


def _check_teacher(config: Config, teacher: TeacherConfig) -> SharedVocabulary:
    key = f"teachers.{teacher.name}"
    local = teacher.backend == "vllm"
    # a format of vLLM's own has files of its own
    weights = local and "load_format" not in teacher.vllm
    require_model(
        f"{key}.model",
        teacher.model,
        num_tokens=config.max_teacher_tokens(teacher),
        weights=weights,
    )
    if local:
        require_served(f"{key}.model", teacher.model)

    try:
        shared = require_same_vocabulary(config.student.model, teacher.model, teacher.eos_remap)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None

    if config.loss.top_k > shared.num_ids:
        raise ConfigError(
            f"loss.top_k: {config.loss.top_k} is larger than the vocabulary of "
            f"{shared.num_ids} tokens"
        )

    return shared


def _views(config: Config) -> Callable[[str], TeacherView | None]:
    """By source, how its teacher reads a prompt; None where it reads the student's."""
    views = {
        teacher.name: TeacherView(
            name=teacher.name,
            template=teacher.template,
            tokenizer=load_tokenizer(teacher.model),
            options=teacher.template_options,
            max_tokens=teacher.max_prompt_tokens or config.prompts.max_tokens,
        )
        for teacher in config.teachers
        if teacher.template is not None
    }
    for view in views.values():
        view.require_text()
        if config.prompts.template == "chat" and not view.tokenizer.chat_template:
            raise ConfigError(
                f"teachers.{view.name}.template: its tokenizer has no chat "
                "template to render it with"
            )

    def view_of(source: str) -> TeacherView | None:
        teacher = config.teacher_of(source)
        return None if teacher is None else views.get(teacher.name)

    return view_of


def count_prompts(where: str, prompts: Sequence[PromptSample], config: Config) -> Mapping[str, int]:
    """Prompts by name of the teacher: of the one that names their source, or of the one that names
    none.

    Raises:
        ConfigError: nobody teaches a source.
    """
    counts = Counter(prompt.source for prompt in prompts)
    taught, untaught = {teacher.name: 0 for teacher in config.teachers}, []

    for source, number in sorted(counts.items()):
        if (teacher := config.teacher_of(source)) is not None:
            taught[teacher.name] += number
        else:
            untaught.append(f"{source!r} ({number} prompts)")

    if untaught:
        named = sorted(source for teacher in config.teachers for source in teacher.sources)
        raise ConfigError(
            f"{where}: nobody teaches source {', '.join(untaught)}; teachers.sources are "
            f"{', '.join(map(repr, named))}; name it there, or leave one teacher without sources"
        )

    return taught
