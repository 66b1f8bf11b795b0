"""The inputs of a run are checked before any worker starts: the machine, models, vocabularies, and
prompts. Every failure is one ``ConfigError``.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

from eopd.config import BenchmarkConfig, Config, ConfigError, TeacherConfig
from eopd.config.base import DATA_SUFFIXES, OWN_GRADERS
from eopd.config.prompts import names_of
from eopd.hub import model_directory
from eopd.preflight.answers import require_answers
from eopd.preflight.environment import is_local, require_environment
from eopd.preflight.functions import require_functions
from eopd.preflight.models import (
    require_heads,
    require_model,
    require_served,
    require_student,
)
from eopd.preflight.options import require_deepspeed_options, require_vllm_options
from eopd.preflight.pinning import key_of_benchmark
from eopd.prompts import PromptOrder, PromptSet, TeacherView
from eopd.prompts.rendering import Rendering, Tokenizer
from eopd.remember import remembered
from eopd.rewards import verifier
from eopd.teacher.vocabulary import SharedVocabulary, require_same_vocabulary
from eopd.telemetry.plain import told_while_slow
from eopd.telemetry.trackers import require_trackers
from eopd.tokenizer import load_tokenizer
from eopd.types import PromptSample

# the sections of a config that ``_prepare`` reads
_READ: Final = {"student", "teachers", "prompts", "rollout", "flow", "loss", "evaluation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Prepared inputs are checked and loaded; ``vocabularies`` go by the teacher's name,
    ``benchmarks`` by their own.
    """

    train: PromptSet
    held_out: PromptSet
    vocabularies: Mapping[str, SharedVocabulary]
    benchmarks: Mapping[str, PromptSet] = field(default_factory=dict)

    def order(self, config: Config) -> PromptOrder:
        """Returns the order in which the training prompts of a run come."""
        return PromptOrder(
            self.train.prompts,
            samples_per_prompt=config.rollout.samples_per_prompt,
            seed=config.run.seed,
            parts=self.train.parts,
            turns=config.prompts.turns,
        )


def prepare(config: Config) -> Prepared:
    """Checks a run's inputs and loads its prompts. The outcome is cached for as long as all files are
    the same; the user's functions are tried each time.

    Raises:
        ConfigError: a model directory or data file is missing, vocabularies or end tokens differ,
            top_k is larger than a vocabulary, vLLM or DeepSpeed have no such option, the student
            has no such layers to adapt, prompts do not fit or have no teacher, a verifier or a
            benchmark has no answers, a tracker cannot be used, a server's key is not set, a function of the user
            cannot be used, or the machine lacks something (``environment.py``).
    """
    with told_while_slow("checking models and reading prompts"):
        prepared = _prepared(config)
        require_functions(config, prepared.train)

    return prepared


def prepare_held_out(config: Config) -> PromptSet:
    """Checks what a measurement on held-out prompts needs, and loads these. Training prompts and
    benchmarks are not read: they may be gone.

    Raises:
        ConfigError: as ``prepare``, but of these.
    """
    with told_while_slow("checking models and reading prompts"):
        _require_machine(config)
        _vocabularies(config)
        return load_held_out(config, load_tokenizer(model_directory(config.student.model)))


def _require_machine(config: Config) -> None:
    """Checks what is no model and no data; raises as ``prepare`` does."""
    require_environment(config)
    require_trackers(config.telemetry.trackers)
    require_native_options(config)
    _require_keys(config)


def _prepared(config: Config) -> Prepared:
    _require_machine(config)
    benchmarks = (benchmark.data for benchmark in config.evaluation.benchmarks)
    parts = chain(config.prompts.data, config.prompts.held_out, *benchmarks)
    data = [Path(part.name) for part in parts]
    graders = {benchmark.grader for benchmark in config.evaluation.benchmarks}
    # a data set by name may change, and so may a function; no file here shows it
    if not all(path.suffix in DATA_SUFFIXES for path in data) or graders.difference(OWN_GRADERS):
        return _prepare(config)

    specs = {config.student.model, *(teacher.model for teacher in config.teachers)}
    models = {model_directory(spec) for spec in specs}
    # A generator: the first directory that cannot be read ends the look-up, and ``_prepare`` raises
    # the error under its key.
    files = (
        file
        for model in models
        for name in ("*", "additional_chat_templates/*")
        for file in model.glob(name)
    )
    question = config.model_dump_json(include=_READ)

    return remembered(question, chain(data, files), lambda: _prepare(config))


def require_native_options(config: Config) -> None:
    """Compares all native options with those of the installed vLLM and DeepSpeed.

    Raises:
        ConfigError: there is no such option, or its value is not allowed.
    """
    require_vllm_options("rollout.vllm", config.rollout.vllm)
    require_deepspeed_options("learner.deepspeed", config.learner.deepspeed)
    for teacher in config.teachers:
        require_vllm_options(f"teachers.{teacher.name}.vllm", teacher.vllm)


def _require_keys(config: Config) -> None:
    """Checks that the keys of served teachers are set, where their clients run on this machine. On a
    cluster they run on other nodes, which have their own variables.

    Raises:
        ConfigError: names the variables that are not set.
    """
    faults = []
    for teacher in config.teachers if is_local(config.cluster) else ():
        variable = teacher.server.api_key_env if teacher.server else None
        if variable and not os.environ.get(variable, "").strip():
            key = f"teachers.{teacher.name}.server.api_key_env"
            faults.append(f"{key}: the environment variable {variable} is not set")

    if faults:
        raise ConfigError("\n".join(faults))


def _prepare(config: Config) -> Prepared:
    vocabularies = _vocabularies(config)
    tokenizer = load_tokenizer(model_directory(config.student.model))

    return Prepared(
        train=load_train(config, tokenizer),
        held_out=load_held_out(config, tokenizer),
        vocabularies=vocabularies,
        benchmarks={
            benchmark.name: load_benchmark(config, benchmark, tokenizer)
            for benchmark in config.evaluation.benchmarks
        },
    )


def require_as_student(
    config: Config, directory: Path, *, weights: bool = True, tokenizer: bool = True
) -> None:
    """Checks that rollout engines and the learner of a run can use its student.

    Args:
        config: the run's.
        directory: the student's.
        weights: false where they are not here.
        tokenizer: false where it is not here.

    Raises:
        ConfigError: they cannot.
    """
    longest = config.max_sequence_tokens
    require_model(
        "student.model", directory, num_tokens=longest, weights=weights, tokenizer=tokenizer
    )
    require_student(directory, num_tokens=longest, weights=weights)
    require_heads("rollout.vllm", directory, config.rollout.vllm)
    if config.student.lora is not None:
        from eopd.learner.lora import check_targets

        check_targets(directory, config.student.lora)


def require_as_teacher(
    config: Config,
    teacher: TeacherConfig,
    directory: Path,
    *,
    weights: bool = True,
    tokenizer: bool = True,
) -> None:
    """Checks that a teacher's model can teach, whoever its student is.

    Args:
        config: the run's.
        teacher: the teacher's section.
        directory: the teacher's directory.
        weights: false where they are not here.
        tokenizer: false where it is not here.

    Raises:
        ConfigError: it cannot.
    """
    key = f"teachers.{teacher.name}"
    is_engine = teacher.backend == "vllm"
    require_model(
        f"{key}.model",
        directory,
        num_tokens=config.max_teacher_tokens(teacher),
        # a format of vLLM's own has files of its own
        weights=weights and is_engine and "load_format" not in teacher.vllm,
        tokenizer=tokenizer,
    )
    if is_engine:
        require_served(f"{key}.model", directory)
        require_heads(f"{key}.vllm", directory, teacher.vllm)


def load_train(config: Config, tokenizer: Tokenizer) -> PromptSet:
    """Loads the training prompts.

    Raises:
        ConfigError: rows are malformed, too long or without a teacher, or a verifier cannot read
            an answer.
    """
    train = PromptSet.load(
        config.prompts.data,
        config.prompts,
        tokenizer,
        _views(config),
        keep_rows=config.reads_rows,
    )
    if config.loss.reward is not None and config.loss.reward.is_ours:
        require_answers(train, config.loss.reward.function, verifier.KEY)

    prompts_by_teacher(names_of(config.prompts.data), train.prompts, config)
    return train


def load_held_out(config: Config, tokenizer: Tokenizer) -> PromptSet:
    """Loads the held-out prompts, one of each part in turn.

    Raises:
        ConfigError: rows are malformed, too long or without a teacher.
    """
    held_out = PromptSet.load(
        config.prompts.held_out, config.prompts, tokenizer, _views(config), key="prompts.held_out"
    )
    prompts_by_teacher(names_of(config.prompts.held_out), held_out.prompts, config)
    return held_out.in_turn()


def load_benchmark(config: Config, benchmark: BenchmarkConfig, tokenizer: Tokenizer) -> PromptSet:
    """Loads the rows of a benchmark, and checks that its grader can read their answers.

    Raises:
        ConfigError: rows are malformed, too long, or without such an answer.
    """
    prompts = config.prompts
    if benchmark.columns is not None:
        prompts = prompts.model_copy(update={"columns": benchmark.columns})

    data = PromptSet.load(benchmark.data, prompts, tokenizer, key=key_of_benchmark(benchmark))
    require_answers(data, benchmark.grader, f"evaluation.benchmarks.{benchmark.name}.grader")
    return data.in_turn()


def _vocabularies(config: Config) -> Mapping[str, SharedVocabulary]:
    """Checks all models; returns what each teacher shares with the student, by the teacher's name."""
    require_as_student(config, model_directory(config.student.model, weights=True))
    return {teacher.name: _vocabulary(config, teacher) for teacher in config.teachers}


def _vocabulary(config: Config, teacher: TeacherConfig) -> SharedVocabulary:
    """Checks a teacher's model; returns the vocabulary that it shares with the student."""
    directory = model_directory(teacher.model, weights=teacher.backend == "vllm")
    require_as_teacher(config, teacher, directory)
    return shared_vocabulary(config, model_directory(config.student.model), teacher, directory)


def shared_vocabulary(
    config: Config, student: Path, teacher: TeacherConfig, directory: Path
) -> SharedVocabulary:
    """Returns the vocabulary that a teacher shares with the student.

    Args:
        config: the run's.
        student: the student's directory.
        teacher: the teacher's section.
        directory: the teacher's directory.

    Raises:
        ConfigError: there is none, or ``loss.top_k`` is above it.
    """
    try:
        shared = require_same_vocabulary(student, directory, teacher.eos_remap)
    except ConfigError as error:
        raise ConfigError(f"teachers.{teacher.name}: {error}") from None

    if config.loss.top_k > shared.num_ids:
        raise ConfigError(
            f"loss.top_k: {config.loss.top_k} is larger than the vocabulary of "
            f"{shared.num_ids} tokens"
        )

    return shared


def _views(config: Config) -> Callable[[str], TeacherView | None]:
    """Returns, for a source, how its teacher renders a prompt; None where it takes the student's."""
    views = {
        teacher.name: TeacherView(
            name=teacher.name,
            template=teacher.template,
            rendering=Rendering(
                whose=f"teacher {teacher.name}",
                tokenizer=load_tokenizer(model_directory(teacher.model)),
                template=config.prompts.template,
                options=teacher.template_options,
            ),
            max_tokens=teacher.max_prompt_tokens or config.prompts.max_tokens,
        )
        for teacher in config.teachers
        if teacher.template is not None
    }
    for view in views.values():
        view.require_text()
        if config.prompts.template == "chat" and not view.rendering.tokenizer.chat_template:
            raise ConfigError(
                f"teachers.{view.name}.template: its tokenizer has no chat "
                "template to render it with"
            )

        if config.prompts.system is not None:
            view.rendering.require_system(config.prompts.system)

    def view_of(source: str) -> TeacherView | None:
        teacher = config.teacher_of(source)
        return None if teacher is None else views.get(teacher.name)

    return view_of


def prompts_by_teacher(
    where: str, prompts: Sequence[PromptSample], config: Config
) -> Mapping[str, int]:
    """Returns the number of prompts of each teacher, by its name.

    Raises:
        ConfigError: no teacher teaches a source.
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
