"""A process takes up a run: it begins it, continues it from a checkpoint, or refuses to. That is
decided here, before anything starts.

    what the run directory holds          without --resume   --resume              --resume auto
    nothing                               begins             refused               begins
    no finished step                      begins             refused               begins
    steps, and no checkpoint              refused            refused               begins again, with a note
    checkpoints of which none is whole    refused            refused               refused
    a whole checkpoint                    refused            continues from it     continues from it
    the same, complete                    refused            measured again        nothing to do

``take_up`` only reads. ``TakenUp.carry_out`` removes the old config, and what the directory holds of
steps after the checkpoint. The run calls it once its actors have loaded the checkpoint: a start that
fails costs nothing.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from eopd.config import Config, ConfigError
from eopd.config.choices import with_choices_of
from eopd.config.prompts import keys_of, names_of
from eopd.ledger import Ledger
from eopd.plugins import sources
from eopd.preflight.disk import require_disk
from eopd.run.changes import OTHER_CONTENTS, Change, changes
from eopd.run.checkpoint import (
    STATE,
    WITHOUT_IT,
    DriverState,
    broken_checkpoints,
    list_checkpoints,
    remove_partial,
    step_of,
)
from eopd.run.directory import RunDirectory
from eopd.run.place import require_no_foreign_files
from eopd.run.provenance import versions_by_key, versions_of
from eopd.run.reading import instead_of_going_on
from eopd.run.record import Summary
from eopd.run.restore import config_of_kept
from eopd.runtime.guard import require_no_collapse

Resume = Literal["no", "yes", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenUp:
    """A run that a process takes up. ``checkpoint``, ``state`` and ``summary`` are None where it
    begins.

    Args:
        directory: the run's directory.
        config: the config for this process.
        inputs: the digests of what the config's paths hold.
        checkpoint: the checkpoint that the run continues from.
        state: the driver's part of that checkpoint.
        summary: the summary that was written last.
        changes: what is computed in another way from here on.
        total_changes: the number of such changes in the life of the run.
        complete: whether nothing is left to do.
        notes: messages for people.
        machines: what is known of the machines it runs on.
    """

    directory: RunDirectory
    config: Config
    inputs: Mapping[str, str]
    checkpoint: Path | None = None
    state: DriverState | None = None
    summary: Summary | None = None
    changes: Sequence[Change] = ()
    total_changes: int = 0
    complete: bool = False
    notes: Sequence[str] = ()
    machines: Mapping[str, object] | None = None

    def begin(self) -> None:
        """Makes the files of a run that begins."""
        if self.checkpoint is None:
            directory = RunDirectory.create(self.config, self.machines)
            directory.write_summary(Summary(status="starting"))  # no checkpoint is without one

    def carry_out(self) -> None:
        """Removes what came after the checkpoint, and keeps the new config."""
        if self.checkpoint is None:
            return

        step = step_of(self.checkpoint)
        remove_partial(self.directory.checkpoints)
        for later in list_checkpoints(self.directory.checkpoints):
            if step_of(later) > step:
                shutil.rmtree(later)

        self.directory.drop_rows_after(step)
        self.directory.go_on(self.config, step, self.changes, self.machines)


def take_up(
    config: Config, inputs: Mapping[str, str], resume: Resume = "no", step: int | None = None
) -> TakenUp:
    """Decides how the run of a config is taken up; the caller holds its lock.

    Args:
        config: the config for this process.
        inputs: the digests of what its paths hold, from ``inputs.digests``.
        resume: ``--resume`` of the command line.
        step: the step of the checkpoint to continue from; else the newest that is whole.

    Raises:
        ConfigError: it cannot be taken up so; the message has what can be done.
    """
    directory = RunDirectory(config.run.path)
    require_no_foreign_files(directory.path)
    checkpoints = list_checkpoints(directory.checkpoints)
    new = TakenUp(directory=directory, config=config, inputs=inputs)
    if not checkpoints:
        require_no_broken(directory)
        begun = replace(new, notes=_begin(directory, resume))
        require_disk(config)
        return begun

    last = step_of(checkpoints[-1])
    if resume == "no":
        raise ConfigError(
            f"run.name: {directory.path} exists, with checkpoints up to step {last}; "
            "continue it with --resume, or choose another name"
        )

    summary = _summary_of(directory)
    is_complete = summary.status == "completed" and summary.steps == last
    if resume == "auto" and is_complete and last == config.run.batches:
        return replace(new, summary=summary, complete=True)

    checkpoint = _checkpoint_to_continue(directory, config, step)
    state = state_of(checkpoint)
    if config.guard.on_collapse == "stop":
        require_no_collapse(directory, state.step)

    config = with_choices_of(directory.config_at(state.step), config)
    changed = [
        *what_changed(directory, config, state, inputs),
        *_other_versions(directory, config, state.step),
    ]

    return replace(
        new,
        config=config,
        checkpoint=checkpoint,
        state=state,
        summary=summary,
        changes=changed,
        total_changes=directory.num_changes(state.step) + len(changed),
        notes=[
            *_notes(directory, checkpoint, checkpoints, changed, named=step is not None),
            *_other_sources(directory, config),
        ],
    )


def _checkpoint_to_continue(directory: RunDirectory, config: Config, step: int | None) -> Path:
    checkpoint = directory.checkpoint(step)
    if step_of(checkpoint) > config.run.batches:
        raise ConfigError(
            f"run.batches: {config.run.batches} is below step {step_of(checkpoint)}, which "
            "the run goes on from; raise it, or go back to an older checkpoint with "
            "--resume --step"
        )

    return checkpoint


def config_to_continue(config: Config, resume: Resume) -> Config | None:
    """Returns the config of the run that goes on as it was written last, here or where it is kept;
    None where one begins.
    """
    if resume == "no":
        return None

    directory = RunDirectory(config.run.path)
    if list_checkpoints(directory.checkpoints):
        return directory.config()

    return config_of_kept(config)


def _summary_of(directory: RunDirectory) -> Summary:
    summary = directory.read_summary()
    if summary is None:
        raise ConfigError(
            f"--resume: {directory.path} has lost its summary.json, which every run with "
            f"checkpoints has. {instead_of_going_on(directory.path)}"
        )

    return summary


def state_of(checkpoint: Path) -> DriverState:
    """Reads the driver's part of a checkpoint.

    Raises:
        ConfigError: it is damaged, or another version wrote it.
    """
    state = DriverState.read(checkpoint)
    try:
        Ledger.restore(**state.ledger)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"{checkpoint / STATE}: its ledger is not what was written; it was damaged, or "
            f"written by another version of eopd. {WITHOUT_IT}"
        ) from None

    return state


def require_no_broken(directory: RunDirectory) -> None:
    """Refuses a directory whose checkpoints are all broken: a person may want to mend one.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
    """
    if broken := broken_checkpoints(directory.checkpoints):
        faults = "; ".join(f"{checkpoint.name}: {why}" for checkpoint, why in broken.items())
        raise ConfigError(
            f"run.name: {directory.path} holds no checkpoint that is whole: {faults}. Put "
            "the missing files back, or choose another name; to give these checkpoints up, "
            f"remove {directory.checkpoints} and start with --resume auto"
        )


def _begin(directory: RunDirectory, resume: Resume) -> list[str]:
    """Returns notes on a run that begins, since there is no checkpoint.

    Raises:
        ConfigError: ``resume`` does not allow it to begin.
    """
    path, steps = directory.path, directory.num_steps()
    if not directory.holds_a_run() and not steps:
        if resume == "yes":
            raise ConfigError(
                f"--resume: {path} holds no run; start it without --resume, or with --resume auto"
            )

        return []

    if resume == "auto":
        return [f"starting over: {path} holds {steps} steps and no checkpoint; they are forgotten"]

    if resume == "yes" or steps:
        option = "--resume" if resume == "yes" else "run.name"
        raise ConfigError(
            f"{option}: {path} holds {steps} steps and no checkpoint to continue from; start "
            "it over with --resume auto, or choose another run.name"
        )

    return []


def _notes(
    directory: RunDirectory,
    checkpoint: Path,
    checkpoints: Sequence[Path],
    changed: Sequence[Change],
    *,
    named: bool,
) -> list[str]:
    step = step_of(checkpoint)
    notes = [] if named else directory.passed_over()
    later = [path.name for path in checkpoints if step_of(path) > step]
    rows = directory.num_steps() - step
    if later:
        notes.append(
            f"going back to step {step}: once training goes on, {', '.join(later)} and the "
            f"rows of {rows} later steps are removed"
        )

    return [*notes, *(f"from step {step + 1}: {change}" for change in changed)]


def _other_sources(directory: RunDirectory, config: Config) -> list[str]:
    """Returns a note for every function of the user whose source is not what it was."""
    before = {key: str(source) for key, source in directory.versions().items()}
    return [
        f"{key}: {config.functions[key]} is not what it was: {before[key]}; now {source}"
        for key, source in sources(config.functions).items()
        if before.get(key, "").startswith(config.functions[key] + ",") and before[key] != source
    ]


def _other_versions(directory: RunDirectory, config: Config, step: int) -> list[Change]:
    """Returns the packages that have another version than at a step, and the commit."""
    before, now = directory.versions_at(step), versions_by_key(versions_of(config, {}))
    return [
        Change(name, before[name], now[name], "always")
        for name in before
        if name in now and before[name] != now[name]
    ]


def what_changed(
    directory: RunDirectory,
    config: Config,
    state: DriverState,
    inputs: Mapping[str, str],
    option: str = "--resume",
) -> list[Change]:
    """Returns what is computed in another way after a checkpoint.

    Args:
        directory: the run that the checkpoint is of.
        config: holds after it.
        state: the driver's part of the checkpoint.
        inputs: the digests of what the paths of the config hold.
        option: of the command line, with which the message of an error begins.

    Raises:
        ConfigError: something changed that makes it another run; the message names all of it, and
            the way out.
    """
    differences = changes(directory.config_at(state.step), config)
    changed = [change for change in differences if change.kind != "contents"]
    paths = [change for change in differences if change.kind == "contents"]
    # nothing to compare with
    if state.inputs is None or state.inputs.get("made_as") != inputs.get("made_as"):
        contents = [replace(change, kind="noted") for change in paths]
    else:
        contents = _changed_contents(config, state.inputs, inputs)

    keys = {change.key for change in changed}
    changed += [change for change in contents if change.key not in keys]
    if refused := [change for change in changed if change.kind == "never"]:
        other = [change.key for change in refused if change.before == OTHER_CONTENTS]
        if any(map(_is_trained_on, other)):  # why they are others
            causes = [change for change in paths if "prompts" in change.key]
            refused += [change for change in causes if change.key not in other]

        _refuse(directory, refused, option)

    return [change for change in changed if change.kind == "noted"]


def _changed_contents(
    config: Config, before: Mapping[str, str], after: Mapping[str, str]
) -> list[Change]:
    """Returns the paths that hold something else than they did, by their digests."""
    paths = {f"teachers.{teacher.name}.model": teacher.model for teacher in config.teachers}
    paths |= {
        f"evaluation.benchmarks.{benchmark.name}.data": names_of(benchmark.data)
        for benchmark in config.evaluation.benchmarks
    }
    paths |= {
        "prompts.data": names_of(config.prompts.data),
        "prompts.held_out": names_of(config.prompts.held_out),
        "student.model": config.student.model,
    }
    parts = config.prompts.data
    paths |= {
        key: part.name
        for key, part in zip(
            keys_of("prompts.data", parts),
            parts,
            strict=True,
        )
    }
    differing = [key for key in paths if key in before and before[key] != after[key]]
    if any(key.startswith("prompts.data.") for key in differing):  # a part says more than the whole
        differing.remove("prompts.data")

    return [
        Change(
            key,
            OTHER_CONTENTS,
            paths[key],
            "never" if key == "student.model" or _is_trained_on(key) else "noted",
        )
        for key in differing
    ]


def _is_trained_on(key: str) -> bool:
    """Tells whether a path names the prompts of training, or a part of them."""
    return key == "prompts.data" or key.startswith("prompts.data.")


def _refuse(directory: RunDirectory, refused: Sequence[Change], option: str) -> None:
    raise ConfigError(
        f"{option}: {'; '.join(map(str, refused))}. That would be another run. Put it back "
        f"as it was; or write the student of this one with `eopd export {directory.path}`, "
        "and start a new run from it (student.model, and another run.name)"
    )
