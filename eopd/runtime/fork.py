"""A run goes on from a checkpoint of another one, under other settings, as a run of its own.

    RUN/checkpoints/step-N ─ hard links ─▶ a directory that looks as if RUN had been stopped at step N
        ─ config, changes, parent.json ─▶ NEW ─▶ eopd train NEW/config.yaml --resume

So a fork is what ``--resume`` knows already, and the same changes are allowed. It goes on with the
prompts that the parent would have had after step N, in the same order: the ledger and the seed are
the parent's. The parent is only read, and may go on meanwhile.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from eopd.config import Config, ConfigError, RunConfig, make_section
from eopd.config.choices import with_choices_of
from eopd.config.load import change_config
from eopd.preflight import prepare
from eopd.run.checkpoint import DriverState, link_checkpoint, step_of
from eopd.run.directory import RunDirectory
from eopd.run.parent import Parent, forgets_moments_at
from eopd.run.record import Summary
from eopd.runtime.inputs import digests
from eopd.runtime.resume import state_of, what_changed

NAME: Final = "run.name="


def fork(
    source: Path,
    *,
    name: str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    fresh_optimizer: bool = False,
) -> RunDirectory:
    """Makes the directory of a run that goes on from a checkpoint of another; nothing is trained yet.

    Args:
        source: the directory of the parent.
        name: of the new run, which lies beside the parent unless ``run.directory`` is set.
        step: the step of the checkpoint; else the newest that is whole.
        overrides: what the new run changes.
        fresh_optimizer: whether it begins with an optimiser without a past.

    Raises:
        ConfigError: there is no such checkpoint, a setting is wrong or would make it another run,
            or there is something at the new place.
    """
    parent = RunDirectory(source)
    parent.config()
    checkpoint = parent.checkpoint(step)
    at = step_of(checkpoint)
    before = parent.config_at(at)
    config = _config(source, before, name, overrides)
    target = config.run.path
    _require_new(name, target)
    if config.run.batches <= at:
        raise ConfigError(
            f"run.batches: {config.run.batches} leaves nothing to train after step {at}; raise it: "
            f"--set run.batches={at + max(at, 1)}"
        )

    with _made_beside(target, name) as made:
        # first: the parent may remove it while the rest is checked
        kept = _linked(checkpoint, made)
        state = state_of(kept)
        inputs = digests(config, prepare(config))
        changed = what_changed(parent, config, state, inputs, option="--set")

        child = RunDirectory(made)
        child.begin_as(parent, state)
        child.go_on(config, at, changed)
        child.write_summary(_summary(parent, state))
        Parent(
            run=str(source.resolve()),
            name=before.run.name,
            step=at,
            fresh_optimizer=fresh_optimizer or forgets_moments_at(source, at),
            changes={change.key: (change.before, change.after) for change in changed},
            time=time.time(),
        ).write(made)

    return RunDirectory(target)


@contextmanager
def _made_beside(target: Path, name: str) -> Iterator[Path]:
    """Yields a hidden directory, which becomes ``target`` when the block has ended well, and goes
    otherwise.
    """
    made = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        made.chmod(0o755)
        yield made
        made.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--name {name}: {target} cannot be made ({reason})") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _linked(checkpoint: Path, made: Path) -> Path:
    root = RunDirectory(made).checkpoints
    root.mkdir()
    try:
        return link_checkpoint(checkpoint, root)
    except FileNotFoundError:
        raise ConfigError(f"{checkpoint} was removed meanwhile; name a newer one: --step") from None


def _config(source: Path, before: Config, name: str, overrides: Sequence[str]) -> Config:
    """Returns the config of the fork: that of the parent at that step, with the overrides."""
    if any(override.startswith(NAME) for override in overrides):
        raise ConfigError(f"--set {NAME}...: the fork is named by --name")

    beside = before.run.model_copy(update={"directory": source.resolve().parent})
    config = change_config(before.model_copy(update={"run": beside}), overrides)
    run = make_section(
        RunConfig,
        {"name": "--name"},
        **config.run.model_dump() | {"name": name},
    )
    return with_choices_of(before, config.model_copy(update={"run": run}))


def _require_new(name: str, target: Path) -> None:
    try:
        is_there = any(target.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"--name {name}: {target} cannot be made ({error.strerror})") from None

    if is_there:
        raise ConfigError(
            f"--name {name}: {target} is there already; choose another name, or continue "
            f"that run with `eopd train {target / 'config.yaml'} --resume`"
        )


def _summary(parent: RunDirectory, state: DriverState) -> Summary:
    """Returns the summary of a run that was interrupted at the checkpoint; what the parent measured
    before training is what the fork is compared with, too.
    """
    summary = parent.read_summary() or Summary(status="interrupted")
    return Summary(
        status="interrupted",
        steps=state.step,
        tokens=state.tokens,
        skipped_steps=state.skipped_steps,
        incarnation=summary.incarnation,
        wall_s=state.wall_s,
        held_out=replace(summary.held_out, after=None),
    )
