"""The run directory, a contract with the user:

runs/<name>/config.yaml     resolved
            metrics.jsonl   one row a step
            samples.jsonl   held-out prompts and texts, before and after
            summary.json    status, steps, tokens, times, held-out numbers
            checkpoints/    step-NNNNNN/, complete or absent
            broken/         optimiser steps that were not finite, if any
            hf/             the trained student as a Hugging Face directory; with LoRA merged
            adapter/        with LoRA, the adapter as peft reads it
            hf-step-NNNNNN/ the student of a checkpoint, where asked for
"""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Self

import yaml

from eopd.checkpoint import list_checkpoints
from eopd.config import Config, ConfigError, dump_config, load_config
from eopd.telemetry.console import Measurement, Sample, Summary
from eopd.telemetry.sinks import append_jsonl
from eopd.types import Estimate, EvalStats

# Sections and keys that a resumed run may change; everything else would make it another run.
MAY_CHANGE = (
    "checkpoint",
    "telemetry",
    "cluster",
    "learner.ranks",
    "learner.cpus",
    "learner.gpus",
    "learner.threads",
    "learner.timeout_s",
    "rollout.timeout_s",
)


class RunDirectory:
    """Names and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.hf = path / "hf"
        self.broken = path / "broken"
        self._summary = path / "summary.json"
        self._samples = path / "samples.jsonl"

    @classmethod
    def create(cls, config: Config) -> Self:
        """A new run; one of this name that never finished a step is replaced.

        Raises:
            ConfigError: there is one of this name already, or the directory cannot be made.
        """
        directory = cls(config.run.path)
        path = directory.path
        if directory.metrics.exists() or (path.exists() and not (path / "config.yaml").exists()):
            raise ConfigError(f"run.name: {path} exists; continue it with --resume or choose another name")
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory._samples.unlink(missing_ok=True)
            (path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.directory: {path} cannot be made ({error.strerror})") from None
        return directory

    @classmethod
    def reopen(cls, config: Config) -> Self:
        """A run to continue; rows of ``metrics.jsonl`` beyond its newest checkpoint are dropped.

        Raises:
            ConfigError: there is no such run or checkpoint, or the config is not the one it was started with.
        """
        directory = cls(config.run.path)
        saved = directory.path / "config.yaml"
        if not saved.exists():
            raise ConfigError(f"--resume: {directory.path} holds no run")
        if not list_checkpoints(directory.checkpoints):
            raise ConfigError(f"--resume: {directory.path} holds no checkpoint; start it under another run.name")
        _require_same(load_config(saved), config)
        saved.write_text(dump_config(config), encoding="utf-8")
        return directory

    def config(self) -> Config:
        """What the run was started with.

        Raises:
            ConfigError: this directory holds no run.
        """
        saved = self.path / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"{self.path} holds no run (it has no config.yaml)")
        return load_config(saved)

    def checkpoint(self, step: int | None) -> Path:
        """The checkpoint of a step, or the newest.

        Raises:
            ConfigError: there is none; names those there are.
        """
        found = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(self.checkpoints)}
        if not found:
            raise ConfigError(f"{self.path} holds no checkpoint")
        if step is None:
            return found[max(found)]
        if step not in found:
            raise ConfigError(f"--step {step}: {self.path} has checkpoints of step {', '.join(map(str, found))} only")
        return found[step]

    def drop_rows_after(self, step: int) -> None:
        """Forget what was measured after the checkpoint that the run continues from."""
        if self.metrics.exists():
            rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            self.metrics.write_text("".join(r for r in rows if json.loads(r)["step"] <= step), encoding="utf-8")

    def write_summary(self, summary: Summary) -> None:
        """Replace ``summary.json``, whole or not at all."""
        partial = self._summary.with_suffix(".partial")
        partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.rename(self._summary)

    def read_summary(self) -> Summary:
        """The summary as it was last written."""
        summary: Summary = json.loads(self._summary.read_text(encoding="utf-8"))
        return summary

    def add_samples(self, phase: str, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        """Append texts (``prompt_id``, ``prompt``, ``response``) of one held-out measurement."""
        for text in texts:
            append_jsonl(self._samples, {"phase": phase, "step": step, **text})

    def samples(self) -> list[Sample]:
        """Prompts with the text before and after, where there are both."""
        if not self._samples.exists():
            return []
        rows = [json.loads(line) for line in self._samples.read_text(encoding="utf-8").split("\n") if line]
        texts = {(row["phase"], row["prompt_id"]): row for row in rows}
        return [
            {"prompt": row["prompt"], "before": texts["before", prompt_id]["response"], "after": row["response"]}
            for (phase, prompt_id), row in texts.items()
            if phase == "after" and ("before", prompt_id) in texts
        ]


def held_out_record(stats: EvalStats) -> dict[str, Measurement]:
    """An ``EvalStats`` as ``summary.json`` keeps it: every estimate with its mean and standard error."""
    estimates = ((name, getattr(stats, name)) for name in stats.__dataclass_fields__)
    return {
        name: {"mean": value.mean, "standard_error": value.standard_error if isfinite(value.standard_error) else None}
        for name, value in estimates
        if isinstance(value, Estimate)
    }


def _require_same(saved: Config, given: Config) -> None:
    may_change = [name for name in MAY_CHANGE if name != "learner.ranks" or given.learner.ranks_may_change]
    before, now = (_flatten(yaml.safe_load(dump_config(config))) for config in (saved, given))
    for key in sorted(before.keys() | now.keys()):
        may = any(key == name or key.startswith(f"{name}.") for name in may_change)
        if not may and before.get(key) != now.get(key):
            raise ConfigError(
                f"--resume: {key} was {before.get(key)!r} and is {now.get(key)!r}; "
                f"only {', '.join(may_change)} may change"
            )


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    if isinstance(tree, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}.{index}", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: leaf for name, value in items for key, leaf in _flatten(value, name).items()}
