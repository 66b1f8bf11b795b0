"""The model card of an exported student: of what it is made, and what was measured. It names no path
and no user of this machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from eopd import __version__
from eopd.config import Config, Part
from eopd.config.document import write_tree
from eopd.config.names import DataName, ModelName
from eopd.run.record import HeldOut, Measurement, Summary

# What a reader of a card looks for, of the names in ``HeldOut``.
NUMBERS: Final = {
    "reverse_kl": "KL of the student to the teacher, nats a token",
    "forward_kl": "KL of the teacher to the student, nats a token",
    "top1_agreement": "positions where both have the same most likely token",
    "student_entropy": "entropy of the student, nats",
    "teacher_entropy": "entropy of the teacher, nats",
}


def model_card(config: Config, summary: Summary | None, step: int, title: str) -> str:
    """Writes the card of a student.

    Args:
        config: the config of its run.
        summary: what the run measured, if it came so far.
        step: the batches that the student was trained on.
        title: the name under which it is shown.
    """
    teachers = ", ".join(_shown(teacher.model) for teacher in config.teachers)
    student = _shown(config.student.model)
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
        *_numbers(summary, step),
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


def _numbers(summary: Summary | None, step: int) -> list[str]:
    """Returns the table of what was measured before and after; a checkpoint from the middle of a
    run has no numbers of its own.
    """
    held_out = summary.held_out if summary is not None and summary.steps == step else HeldOut()
    before, after = held_out.before or {}, held_out.after or {}
    rows = [
        f"| {words} | {_number(before.get(name))} | {_number(after.get(name))} |"
        for name, words in NUMBERS.items()
        if name in after
    ]
    if not rows:
        return []

    return ["## On held-out prompts", "", "| | before | after |", "|---|---|---|", *rows, ""]


def _number(measured: Measurement | None) -> str:
    if measured is None or not math.isfinite(measured.mean):
        return ""

    error = measured.standard_error
    return f"{measured.mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _shown(model: str) -> str:
    return model if ModelName.parse(model) is not None else Path(model).name


def _shown_data(parts: Sequence[Part]) -> str:
    return ", ".join(
        part.name if part.data is None or _data_name(part) else Path(part.data).name
        for part in parts
    )


def _data_name(part: Part) -> DataName | None:
    """Returns the name of a data set; None of a file or of a function."""
    is_named = part.data is not None and not Path(part.data).is_absolute()
    return DataName.parse(part.name) if is_named else None
