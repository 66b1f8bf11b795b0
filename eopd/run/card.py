"""The model card of an exported student: of what it is made, and what was measured. It names no path
and no user of this machine.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from eopd import __version__
from eopd.config import Config, Part
from eopd.config.benchmark import HELD_OUT
from eopd.config.document import write_tree
from eopd.config.names import DataName, ModelName, shown
from eopd.run.evaluations import Evaluation
from eopd.run.record import Measurement

# What a reader of a card looks for, of what is measured on held-out prompts.
NUMBERS: Final = {
    "reverse_kl": "KL of the student to the teacher, nats a token",
    "forward_kl": "KL of the teacher to the student, nats a token",
    "top1_agreement": "positions where both have the same most likely token",
    "student_entropy": "entropy of the student, nats",
    "teacher_entropy": "entropy of the teacher, nats",
}


def model_card(config: Config, evaluations: Sequence[Evaluation], step: int, title: str) -> str:
    """Writes the card of a student.

    Args:
        config: the config of its run, as it held at that step.
        evaluations: what the run measured.
        step: the batches that the student was trained on.
        title: the name under which it is shown.
    """
    teachers = ", ".join(shown(teacher.model) for teacher in config.teachers)
    student = shown(config.student.model)
    objective = config.loss.model_dump(mode="json")
    lines = [
        "---",
        write_tree(_metadata(config)).rstrip(),
        "---",
        f"# {title}",
        "",
        f"{student}, distilled on its own responses from {teachers}, with eopd {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| student | {student} |",
        f"| teacher | {teachers} |",
        f"| trained on | {_shown_data(config.prompts.data)} |",
        f"| held out | {_shown_data(config.prompts.held_out)} |",
        f"| batches | {step} of {config.batch_trajectories} responses each |",
        "",
        *_numbers(evaluations, step),
        "## Objective",
        "",
        "```yaml",
        write_tree({"loss": objective}).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _metadata(config: Config) -> dict[str, object]:
    """Returns what the Hub reads of a card."""
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["eopd", "on-policy-distillation"],
    }
    if (student := ModelName.parse(config.student.model)) is not None:
        metadata["base_model"] = student.repository

    names = [_data_name(part) for part in config.prompts.data]
    repositories = [name.repository for name in names if name is not None]
    if datasets := [repository for repository in repositories if "/" in repository]:
        metadata["datasets"] = datasets

    return metadata


def _numbers(evaluations: Sequence[Evaluation], step: int) -> list[str]:
    """Returns the table of what was measured before training and at this step, if it was."""
    first = {one.name: one for one in reversed(evaluations) if one.step == 0}
    at_step = {one.name: one for one in evaluations if one.step == step}
    rows = []

    for name, one in at_step.items():
        before = first[name].measurements if name in first else {}
        for metric, words in _words(one).items():
            if metric in one.measurements:
                numbers = _number(before.get(metric)), _number(one.measurements[metric])
                rows.append(f"| {words} | {' | '.join(numbers)} |")

    if not rows:
        return []

    return [
        "## What was measured",
        "",
        f"| | before | after {step} batches |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _words(one: Evaluation) -> Mapping[str, str]:
    """Returns what is shown of an evaluation, by the names of its measurements."""
    if one.name == HELD_OUT:
        return {metric: f"held out: {words}" for metric, words in NUMBERS.items()}

    n = one.samples
    return {
        "avg_at_n": f"{one.name}: share of responses that are right (avg@{n})",
        f"pass_at_{n}": f"{one.name}: prompts with a right one among {n} (pass@{n})",
    }


def _number(measured: Measurement | None) -> str:
    if measured is None or not math.isfinite(measured.mean):
        return ""

    return measured.shown(digits=4)


def _shown_data(parts: Sequence[Part]) -> str:
    return ", ".join(shown(part.name) for part in parts)


def _data_name(part: Part) -> DataName | None:
    """Returns the name of a data set; None of a file or of a function."""
    is_named = part.data is not None and not Path(part.data).is_absolute()
    return DataName.parse(part.name) if is_named else None
