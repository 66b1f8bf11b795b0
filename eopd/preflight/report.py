"""A config that was checked is described to a person: what was found, and what is odd and may be
meant.

Nothing is refused here; ``inputs.py`` does that.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from eopd.config import Config, TeacherConfig
from eopd.config.choices import choice_notes
from eopd.plugins import sources
from eopd.preflight.disk import disk_notes
from eopd.preflight.environment import environment_notes, is_local
from eopd.preflight.inputs import Prepared, prompts_by_teacher
from eopd.types import PromptSample, Reference

HIGH_LR: Final = 0.1
MANY_BATCHES: Final = 1_000_000
STALE: Final = 64


def describe(config: Config, prepared: Prepared) -> Iterator[str]:
    """Yields what was checked, line by line, for a person to read."""
    train, held_out = prepared.train.prompts, prepared.held_out.prompts
    num_train = prompts_by_teacher("prompts.data", train, config)
    num_held_out = prompts_by_teacher("prompts.held_out", held_out, config)
    yield f"student {config.student.model}"

    for teacher in config.teachers:
        shared = prepared.vocabularies[teacher.name]
        ends, other_ends = shared.student_ends, shared.teacher_ends
        remap = (
            f"{own} {ends[own]} -> {theirs} {other_ends[theirs]}"
            for own, theirs in teacher.eos_remap.items()
        )
        where = f"{teacher.replicas} x {teacher.backend}"
        if teacher.server is not None:
            where = f"{teacher.server.url}, which --live asks"

        yield f"teacher {teacher.name}: {teacher.model} ({where})"
        rows = f"student {shared.student_rows}, teacher {shared.teacher_rows}"
        yield f"  vocabulary  {shared.num_tokens} tokens; rows of the heads: {rows}"
        yield f"  end tokens  student {_listed(ends)}; teacher {_listed(other_ends)}"
        yield f"  eos_remap   {', '.join(remap) or 'none'}"
        counts = f"{num_train[teacher.name]} to train, {num_held_out[teacher.name]} held out"
        yield f"  prompts     {counts}"
        yield from (f"  note        {note}" for note in shared.notes)

    yield from _parts(config, prepared.train.parts)
    for benchmark in config.evaluation.benchmarks:
        asked = len(prepared.benchmarks[benchmark.name].prompts[: benchmark.prompts])
        every = config.evaluation.period(benchmark.name)
        often = "before and after training" if every is None else f"every {every} batches"
        yield f"benchmark {benchmark.name}: {asked} prompts x {benchmark.samples}, {often}"

    for key, source in sources(config.functions).items():
        yield f"function {key}: {source}"

    yield from notes(config, prepared)
    yield from environment_notes(config)


def _parts(config: Config, parts: Sequence[Sequence[PromptSample]]) -> Iterator[str]:
    """Yields a line for each part of the training prompts, with its share of them, where there are
    several.
    """
    numbers = [len(part) for part in parts]
    turns = config.prompts.turns or numbers
    for part, number, turn in zip(config.prompts.data, numbers, turns, strict=True):
        if len(parts) > 1:
            yield f"part {part.name}: {number} prompts, {turn / sum(turns):.1%} of training"


def notes(config: Config, prepared: Prepared) -> Iterator[str]:
    """Yields what was chosen for the user, and what is odd and may be meant, in the config and in its
    data.
    """
    yield from choice_notes(config)
    if why := config.waits_for_batch:
        yield f"the learner begins a step when its whole batch is there, because of {why}"

    of_benchmarks = itertools.chain(*(data.notes for data in prepared.benchmarks.values()))
    of_prompts = (*prepared.train.notes, *prepared.held_out.notes, *of_benchmarks)
    of_machine = (*_of_threads(config), *disk_notes(config))
    for note in (*of_prompts, *oddities(config), *_of_data(config, prepared), *of_machine):
        yield f"note: {note}"


def oddities(config: Config) -> Iterator[str]:
    """Yields a sentence for each odd value of the config, beginning with its key."""
    yield from _of_length(config)
    yield from _of_learning(config)
    yield from _of_flow(config)


def _of_data(config: Config, prepared: Prepared) -> Iterator[str]:
    """Yields what does not fit the data."""
    train, held_out = prepared.train.prompts, prepared.held_out.prompts
    if config.flow.batch_prompts > len(train):
        yield (
            f"flow.batch_prompts: {config.flow.batch_prompts} is above the {len(train)} "
            "prompts of prompts.data; a batch holds some of them more than once"
        )

    for benchmark in config.evaluation.benchmarks:
        number = len(prepared.benchmarks[benchmark.name].prompts)
        if benchmark.prompts is not None and benchmark.prompts > number:
            yield (
                f"evaluation.benchmarks.{benchmark.name}.prompts: {benchmark.prompts} is above "
                f"the {number} prompts of its data; all of them are used"
            )

    if config.evaluation.prompts > len(held_out):
        yield (
            f"evaluation.prompts: {config.evaluation.prompts} is above the {len(held_out)} "
            "prompts of prompts.held_out; all of them are used"
        )

    repeated = len(train) - len({_read_of(prompt) for prompt in train})
    if repeated and not config.reads_rows:
        yield f"prompts.data: {repeated} of its {len(train)} prompts are copies of others"

    seen = {prompt.token_ids.tobytes() for prompt in train}
    shared = sum(prompt.token_ids.tobytes() in seen for prompt in held_out)
    if shared and not _held_out_is_data(config):
        yield f"prompts.held_out: {shared} of its {len(held_out)} prompts are in prompts.data too"

    for name, count in prompts_by_teacher("prompts.data", train, config).items():
        if not count:
            yield f"teachers.{name}: teaches nothing: no row has its sources"


def _of_threads(config: Config) -> Iterator[str]:
    """Yields the actors that have more threads than this machine has cores, where they run here."""
    threads = {"learner": config.learner.threads, "rollout": config.rollout.threads}
    threads |= {f"teachers.{teacher.name}": teacher.threads for teacher in config.teachers}
    cores = os.cpu_count() or 1
    for name, number in threads.items():
        if number > cores and is_local(config.cluster):
            yield f"{name}.threads: {number} on a machine of {cores} cores, which share its time"


def _of_length(config: Config) -> Iterator[str]:
    """Yields what does not fit the length of the run."""
    batches, warmup = config.run.batches, config.loss.alpha_warmup
    if batches > MANY_BATCHES:
        yield f"run.batches: {batches} are {batches / 86_400:.0f} days at a batch a second"

    if config.learner.warmup_batches >= batches:
        yield (
            f"learner.warmup_batches: {config.learner.warmup_batches} is not below "
            f"run.batches {batches}; learner.lr is reached at the end or never"
        )

    if warmup.start < 1.0 and warmup.batches >= batches:
        yield (
            f"loss.alpha_warmup.batches: {warmup.batches} is not below run.batches {batches}; "
            "loss.alpha is reached at the end or never"
        )

    if warmup.start < 1.0 and warmup.batches == 0:
        yield "loss.alpha_warmup.start: has no effect while loss.alpha_warmup.batches is 0"

    if config.checkpoint.every > batches:
        yield (
            f"checkpoint.every: {config.checkpoint.every} is above run.batches {batches}; "
            "the only one is at the end"
        )

    if config.evaluation.every is not None and config.evaluation.every >= batches:
        yield (
            f"evaluation.every: {config.evaluation.every} is not below run.batches {batches}; "
            "nothing is measured between its two ends"
        )


def _of_learning(config: Config) -> Iterator[str]:
    """Yields what makes the student learn something else than the defaults do."""
    loss, learner, rollout = config.loss, config.learner, config.rollout
    if learner.lr > HIGH_LR:
        yield f"learner.lr: {learner.lr:g} moves every weight by about as much in each step"

    if learner.betas[0] > learner.betas[1]:
        yield (
            f"learner.betas: {learner.betas[0]:g} before {learner.betas[1]:g}; the first is "
            "usually the smaller"
        )

    if loss.top_k == 1:
        yield "loss.top_k: the forward KL compares the teacher's first candidate alone"

    if loss.alpha == 0.0 and loss.gate.kind != "never":
        yield "loss.gate: has no effect while loss.alpha is 0"

    for teacher in config.teachers:
        if teacher.temperature != rollout.temperature:
            yield (
                f"teachers.{teacher.name}.temperature: {teacher.temperature:g} differs from "
                f"rollout.temperature {rollout.temperature:g}; the student learns a sharper "
                "or flatter distribution than its own"
            )


def _of_flow(config: Config) -> Iterator[str]:
    """Yields what is odd in the prompts that the run reads, and in its staleness."""
    for name in ("suffix", "system"):
        text = getattr(config.prompts, name) or ""
        if re.search(r"\\n(?![a-z])", text):  # \nabla is a formula
            yield (
                f"prompts.{name}: holds \\n as two characters, and no line end; a line end needs "
                f"double quotes in YAML, on the command line --set 'prompts.{name}=\"...\\n...\"'"
            )

    if config.flow.filter is not None and config.loss.reward is not None:
        yield (
            "flow.filter: what it drops moves all later responses up, so that two batches may share "
            "those to one prompt; a reward is compared within its batch, and one that is alone there "
            "gives no advantage"
        )

    if config.flow.max_staleness > STALE:
        yield (
            f"flow.max_staleness: trajectories may be {config.flow.max_staleness} versions "
            "behind what is trained"
        )

    if config.loss.reward is None and all(_is_student(config, each) for each in config.teachers):
        yield (
            "teachers: all are student.model and read the same prompts, so they teach what the student "
            "does already; give them a template, or another model"
        )

    if _held_out_is_data(config):
        yield "prompts.held_out: is prompts.data; held-out numbers are then those of training"


def _is_student(config: Config, teacher: TeacherConfig) -> bool:
    """Tells whether a teacher is the student as it begins, asked in the same way."""
    is_same = teacher.model == config.student.model and teacher.template is None
    return is_same and teacher.temperature == config.rollout.temperature


def _read_of(prompt: PromptSample) -> tuple[str, bytes, bytes | None, Reference | None]:
    """Returns what student, teacher and verifier read of a prompt."""
    of_teacher = prompt.teacher_token_ids
    shown = None if of_teacher is None else of_teacher.tobytes()
    return prompt.source, prompt.token_ids.tobytes(), shown, prompt.reference_answer


def _held_out_is_data(config: Config) -> bool:
    """Tells whether the held-out prompts are the training prompts, whatever their weights and
    sources.
    """
    train, held_out = (
        [(part.data, part.function, part.options, part.columns) for part in parts]
        for parts in (config.prompts.data, config.prompts.held_out)
    )
    return train == held_out


def _listed(ends: Mapping[int, str]) -> str:
    return ", ".join(f"{token_id} {token}" for token_id, token in ends.items())
