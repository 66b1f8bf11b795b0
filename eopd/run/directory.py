"""The run directory, a contract with the user:

runs/<name>/config.yaml     resolved, as it holds now
            changes.jsonl   what was changed when the run went on: from which step, from what to what
            run.lock        who runs this run now (``run/lock.py``)
            metrics.jsonl   one row a step
            trained.jsonl   what each step trained on: issue numbers, and a checksum of each response's token ids
            dropped.jsonl   trajectories that were given up, each with its last loss, and those that the filter dropped
            timeline.jsonl  when in each step who did what: spans in seconds from its start
            responses.jsonl training responses, as ``telemetry.responses`` asks: text, reward, numbers of each token
            evaluations.jsonl  everything that was measured, a line each (``run/evaluations.py``)
            held_out.jsonl  before and after training: entropy histograms, and samples: text, and numbers of each token
            versions.json   of Python and the packages that matter, the commit, the machines, and the sources of the
                            user's functions: where this was run last
            report.html     all of it to look at, made when a process leaves the run (``eopd report``)
            summary.json    status, steps, tokens, times, held-out numbers
            checkpoints/    step-NNNNNN/, each with a manifest that says whether it is whole
            broken/         optimiser steps that were not finite, if any
            hf/             the trained student as a Hugging Face directory; with LoRA merged
            hf-best/        the best student, where ``checkpoint.keep_best`` says which that is
            adapter/        with LoRA, the adapter as peft reads it; that of the best is hf-best-adapter/
            hf-step-NNNNNN/ the student of a checkpoint, where asked for
            logs/           what the driver and every actor wrote, a file each (``runtime/logs.py``)
            run-id          what it is known by where run.upload keeps it (``run/upload.py``)
            scale.json      how many rollout engines ``eopd scale`` asks for; forgotten when a process takes up the run
            stop.json       that ``eopd stop`` asks a process to end; gone once it has taken it

``trained.jsonl`` is a proof that a user can check. Issue number i is a pure function of the seed
(``PromptOrder``), so the ``issues`` of all rows, and of ``dropped.jsonl``, hold every number once,
whatever the run went through; and the ``crc32`` of two runs that sampled the same tokens are equal. Rows after the
checkpoint that a run continues from are dropped, as in ``metrics.jsonl`` and ``timeline.jsonl``.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from eopd.config import Config, ConfigError, dump_config, load_config
from eopd.config.saved import require_directory
from eopd.ledger import Ledger
from eopd.run.changes import Change
from eopd.run.checkpoint import (
    DriverState,
    broken_checkpoints,
    list_checkpoints,
    remove_checkpoints,
    step_of,
)
from eopd.run.evaluations import best_checkpoints, read_evaluations
from eopd.run.lock import holder, last_holder
from eopd.run.parent import PARENT
from eopd.run.place import require_no_foreign_files
from eopd.run.provenance import versions_at, versions_by_key, versions_of
from eopd.run.reading import (
    config_before,
    is_up_to_step,
    read_changes,
    read_object,
    read_rows,
    read_samples,
    read_summary,
    up_to_step,
)
from eopd.run.record import RUN_ID, Row, Sample, Summary, append_jsonl
from eopd.run.storage import append_kept, force_kept, write_whole
from eopd.types import ENTROPY_BIN_NATS, EvalStats, Header, LostReason, LostTrajectory, Span

_OF_ANOTHER = "it was changed by hand, or written by another version of eopd"
_MAY_BE_CUT = 8  # lines at the end of a file, by crashes and full disks
_OUT_OF_ORDER = 1_000  # among so many rows steps may go back: benchmarks end beside later steps


class RunDirectory:
    """Names and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.trained = path / "trained.jsonl"
        self.dropped = path / "dropped.jsonl"
        self.checkpoints = path / "checkpoints"
        self.hf = path / "hf"
        self.adapter = path / "adapter"
        self.hf_best = path / "hf-best"
        self.adapter_of_best = path / "hf-best-adapter"
        self.broken = path / "broken"
        self.logs = path / "logs"
        self._config = path / "config.yaml"
        self._versions = path / "versions.json"
        self._changes = path / "changes.jsonl"
        self._summary = path / "summary.json"
        self.timeline = path / "timeline.jsonl"
        self.report = path / "report.html"
        self.responses = path / "responses.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self._held_out = path / "held_out.jsonl"
        self._scale = path / "scale.json"
        self._by_step = (
            self.metrics,
            self.trained,
            self.timeline,
            self.responses,
            self.evaluations,
            self._held_out,
        )

    @classmethod
    def create(cls, config: Config, machines: Mapping[str, object] | None = None) -> Self:
        """Make the directory of a run that begins, and remove what an earlier run of this name left
        there. The caller has checked that it may.

        Args:
            config: the run.
            machines: what is known of the machines it runs on, for ``versions.json``.

        Raises:
            ConfigError: the directory cannot be made, or holds something that is no run of eopd.
        """
        directory = cls(config.run.path)
        path = directory.path
        require_no_foreign_files(path)
        old_files = (
            *directory._by_step,
            directory.dropped,
            directory._changes,
            directory._summary,
            directory._scale,
            directory.report,
            path / PARENT,
            path / RUN_ID,
        )

        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in (*old_files, *path.glob(f"*/{RUN_ID}")):
                file.unlink(missing_ok=True)

            remove_checkpoints(directory.checkpoints)
            for made in (directory.broken, *path.glob("hf-best*")):
                shutil.rmtree(made, ignore_errors=True)

            directory._write_versions(config, machines or {})
            directory._config.write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.directory: {path} cannot be made ({error.strerror})") from None

        return directory

    def holds_a_run(self) -> bool:
        """Returns whether a run was begun here."""
        return self._config.is_file()

    def num_steps(self) -> int:
        """Returns the last step that a row names, or 0."""
        rows = [*read_rows(self.metrics, last=2), *read_rows(self.trained, last=2)]
        return max((row["step"] for row in up_to_step(rows, math.inf)), default=0)

    def go_on(
        self,
        config: Config,
        step: int,
        changes: Sequence[Change],
        machines: Mapping[str, object] | None = None,
    ) -> None:
        """Write the config that holds from the step after ``step`` on, what it changes of the one
        before, and on which machines it runs now.
        """
        records = [
            asdict(change) for change in read_changes(self._changes) if change.from_step <= step
        ]
        if changes:
            values = {change.key: [change.before, change.after] for change in changes}
            before = self.config_at(step).model_dump(mode="json")
            records.append(
                {"from_step": step + 1, "time": time.time(), "changes": values, "before": before}
            )

        # before config.yaml: after a crash between the two, the config is the one before the change
        if records or self._changes.exists():
            write_whole(self._changes, "".join(json.dumps(record) + "\n" for record in records))

        self._scale.unlink(missing_ok=True)
        self._write_versions(config, machines or {})
        write_whole(self._config, dump_config(config))

    def config_at(self, step: int) -> Config:
        """Returns the config that held when the checkpoint of a step was written."""
        for change in read_changes(self._changes):
            if change.from_step > step:
                return config_before(self._changes, change)

        return self.config()

    def config_of_student(self, step: int) -> Config:
        """Returns the config as it holds now, with the adapters that the student of a step was trained
        with: their ``alpha`` may have been changed since.
        """
        now, lora = self.config(), self.config_at(step).student.lora
        return now.model_copy(update={"student": now.student.model_copy(update={"lora": lora})})

    def num_changes(self, step: int) -> int:
        """Returns how many keys were changed up to a step."""
        return sum(
            len(change.changes)
            for change in read_changes(self._changes)
            if change.from_step <= step
        )

    def config(self) -> Config:
        """Returns the config as it holds now.

        Raises:
            ConfigError: this is no directory, or it cannot be read, or holds no run.
        """
        require_directory(self.path)
        if not self.holds_a_run() and (starting := holder(self.path)):
            raise ConfigError(
                f"{self.path} is being started by {starting}; look again in a moment, or, where it "
                "waits for room in its cluster, once others have ended"
            )

        if not self.holds_a_run():
            is_sweep = (self.path / "sweep.json").exists()
            hint = f"; it is a sweep, whose runs `eopd list {self.path}` shows" if is_sweep else ""
            raise ConfigError(f"{self.path} holds no run (it has no config.yaml){hint}")

        try:
            return load_config(self._config)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_OF_ANOTHER}") from None

    def checkpoint(self, step: int | None) -> Path:
        """Returns the checkpoint of a step, or the newest that is whole.

        Raises:
            ConfigError: there is none, or it is not whole; names those there are, or what is wrong.
        """
        for path, why in broken_checkpoints(self.checkpoints).items():
            if step == step_of(path):
                raise ConfigError(f"--step {step}: {path} is not whole: {why}")

        whole = {step_of(path): path for path in list_checkpoints(self.checkpoints)}
        if not whole:
            raise ConfigError(f"{self.path} holds no checkpoint{self._broken_ones()}")

        if step is None:
            return whole[max(whole)]

        if step not in whole:
            raise ConfigError(
                f"--step {step}: {self.path} has checkpoints of step "
                f"{', '.join(map(str, whole))} only"
            )

        return whole[step]

    def best_step(self) -> int:
        """Returns the step of the best checkpoint.

        Raises:
            ConfigError: the run keeps none, or none was measured.
        """
        keep_best = self.config().checkpoint.keep_best
        if keep_best is None:
            raise ConfigError(f"--best: {self.path} keeps no best (checkpoint.keep_best is null)")

        evaluations = read_evaluations(self.evaluations)
        if not (best := best_checkpoints(self.checkpoints, evaluations, keep_best)):
            raise ConfigError(
                f"--best: {self.path} holds no checkpoint whose {keep_best.metric} was measured"
                f"{self._broken_ones()}"
            )

        return best[0].step

    def _broken_ones(self) -> str:
        """Returns the end of a message about checkpoints that are missing: those that are not whole."""
        broken = broken_checkpoints(self.checkpoints)
        faults = [f"{path.name} ({why})" for path, why in broken.items()]
        return f"; these are not whole: {', '.join(faults)}" if faults else ""

    def passed_over(self) -> list[str]:
        """Returns a message for every checkpoint that is newer than the newest whole one."""
        newest = list_checkpoints(self.checkpoints)[-1:]
        return [
            f"passing over {broken}: {why}; the newest that is whole is {whole.name}"
            for whole in newest
            for broken, why in broken_checkpoints(self.checkpoints).items()
            if step_of(broken) > step_of(whole)
        ]

    def drop_rows_after(self, step: int) -> None:
        """Remove the rows of steps after the checkpoint that the run continues from. A file whose last
        rows are of steps before it is left as it is: it may be large.
        """
        for path in self._by_step:
            last = read_rows(path, last=_OUT_OF_ORDER)
            if not all(is_up_to_step(row, step) for row in last):
                _write_rows(path, up_to_step(read_rows(path), step))

    def force_rows(self) -> None:
        """Brings to the disk what says which steps were trained, and how the student did by then.

        Raises:
            StorageError: the disk did not take it.
        """
        for path in (self.trained, self.dropped, self.metrics, self.evaluations):
            force_kept(path)

    def begin_as(self, parent: "RunDirectory", state: DriverState) -> None:
        """Write what another run holds of itself up to a checkpoint: its config with the changes of
        it, its rows, and what was dropped by then.
        """
        for path in (parent._config, parent._changes):
            if path.exists():
                write_whole(self.path / path.name, path.read_text(encoding="utf-8"))

        for path in parent._by_step:
            if path.exists():
                _write_rows(self.path / path.name, up_to_step(read_rows(path), state.step))

        settled = Ledger.restore(**state.ledger).settled  # type: ignore[arg-type]
        dropped = [
            row
            for row in read_rows(parent.dropped)
            if isinstance(issue := row.get("issue"), int) and issue in settled
        ]
        if dropped:
            _write_rows(self.dropped, dropped)

    def add_trained(self, step: int, trained: Mapping[int, Header]) -> None:
        """Append to ``trained.jsonl`` which trajectories, by issue number, a step trained on.

        Raises:
            StorageError: the disk did not take it.
        """
        checksums = [header.response_crc32 for header in trained.values()]
        append_kept(self.trained, {"step": step, "issues": list(trained), "crc32": checksums})

    def add_timeline(
        self, step: int, incarnation: int, spans: Mapping[str, Sequence[Span]]
    ) -> None:
        """Append to ``timeline.jsonl`` who did what when in a step, and which incarnation of the learner
        made the step.
        """
        row: dict[str, object] = {"step": step, "incarnation": incarnation}
        for stage, times in spans.items():
            row[stage] = [[round(start, 4), round(stop, 4)] for start, stop in times]
        append_jsonl(self.timeline, row)

    def add_responses(self, step: int, records: Sequence[Mapping[str, object]]) -> None:
        """Append to ``responses.jsonl`` what ``evaluation.samples.response_record`` made of
        responses that a step trained on, a line each.
        """
        for record in records:
            append_jsonl(self.responses, {"step": step, **record})

    def add_dropped(self, issue: int, lost: LostTrajectory) -> None:
        """Append to ``dropped.jsonl`` a trajectory that was given up or filtered, and how it was lost
        last.

        The line stays there, whatever checkpoint the run continues from.

        Raises:
            StorageError: the disk did not take it.
        """
        row = {
            "issue": issue,
            **lost.key._asdict(),
            "reason": lost.reason.value,
            "detail": lost.detail[:1000],
        }
        append_kept(self.dropped, row)

    def dropped_issues(self) -> tuple[list[int], list[int]]:
        """Returns the issue numbers of ``dropped.jsonl``: those that were given up, and those that
        the filter of the run dropped.
        """
        given_up, filtered = list[int](), list[int]()
        for row in read_rows(self.dropped):
            if isinstance(issue := row.get("issue"), int):
                was_filtered = row.get("reason") == LostReason.FILTERED.value
                (filtered if was_filtered else given_up).append(issue)

        return given_up, filtered

    def ask_for_engines(self, num_engines: int) -> None:
        """Ask the process that runs this run for so many rollout engines.

        Raises:
            ConfigError: this is no run, or it is not running.
        """
        self.config()
        if (status := self.status()) != "running":
            raise ConfigError(f"{self.path} is {status}: only a run that is running can be scaled")

        write_whole(self._scale, json.dumps({"engines": num_engines}) + "\n")

    def status(self) -> str:
        """Returns the status of the run: that of its summary, compared with who holds its lock. The
        first word is the status itself.
        """
        self.config()
        summary, running = self.read_summary(), holder(self.path)
        status = summary.status if summary else "starting"
        if running and status not in ("running", "starting"):
            return f"{status} (and being taken up, or left, by {running})"

        if not running and status in ("running", "starting"):
            process = last_holder(self.path)
            return f"dead ({f'{process},' if process else 'the process that ran it'} is gone)"

        return status

    def resume_options(self) -> list[str]:
        """Returns the options of ``eopd train`` that continue this run, or begin it again where it
        has no checkpoint.
        """
        return ["--resume"] if list_checkpoints(self.checkpoints) else ["--resume", "auto"]

    def engines_asked_for(self) -> int | None:
        """Returns how many rollout engines were asked for since this process took up the run; None
        if nobody did, or if the file is not what ``eopd scale`` writes, which ends no run.
        """
        for row in read_rows(self._scale, last=1):
            engines = row.get("engines")
            if isinstance(engines, int) and engines > 0:
                return engines

        return None

    def write_summary(self, summary: Summary) -> None:
        """Replace ``summary.json``, whole or not at all."""
        write_whole(self._summary, json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n")

    def read_summary(self) -> Summary | None:
        """Returns the summary as it was last written; None where there is none."""
        return read_summary(self._summary)

    def last_rows(self, count: int) -> list[Row]:
        """Returns at most ``count`` of the newest whole rows of ``metrics.jsonl``, with their ``time``
        (seconds since 1970), without what was no number.
        """
        rows: list[Row] = []
        for row in read_rows(self.metrics, last=count + _MAY_BE_CUT):
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            if {"eopd_step", "time"} <= numbers.keys():
                rows.append(numbers)

        return rows[-count:]

    def add_held_out(
        self, phase: str, step: int, stats: EvalStats, samples: Sequence[Mapping[str, object]]
    ) -> None:
        """Append a measurement to ``held_out.jsonl``: entropy histograms (see ``EvalStats``), and
        what ``evaluation.samples.sample_record`` made of the samples.
        """
        record = {
            "phase": phase,
            "step": step,
            "num_trajectories": stats.num_prompts,
            "num_dropped": stats.num_dropped,
            "entropy_bin_nats": ENTROPY_BIN_NATS,
            "student_entropy_counts": stats.student_entropy_counts,
            "teacher_entropy_counts": stats.teacher_entropy_counts,
            "samples": samples,
        }
        append_jsonl(self._held_out, record)

    def versions(self) -> dict[str, object]:
        """Returns what ``provenance.versions_of`` said when the run was taken up last."""
        return read_object(self._versions)

    def versions_at(self, step: int) -> dict[str, str]:
        """Returns what computed the step of a checkpoint, as ``provenance.versions_by_key`` has it."""
        return versions_at(step, versions_by_key(self.versions()), read_changes(self._changes))

    def _write_versions(self, config: Config, machines: Mapping[str, object]) -> None:
        versions = versions_of(config, machines)
        write_whole(self._versions, json.dumps(versions, indent=2) + "\n")

    def samples(self) -> list[Sample]:
        """Returns the samples of the last measurements, of prompts that have one before and one
        after training. What is damaged is left out.
        """
        return read_samples(self._held_out)


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
