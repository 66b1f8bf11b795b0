"""The runs of a sweep, one after another or side by side, each a process of its own.

    check ─ every run, before any starts ─▶ run ─ eopd train ... --resume auto ─▶ results, report

A run is ``eopd train`` of a config that lies in the sweep's directory, and nothing but that: it can
be looked at, stopped and continued like any other. What became of it is read from its exit code and
its ``summary.json``. Left out: runs on several machines that share no Ray cluster.

With ``parallel`` the runs share one Ray: the cluster of ``cluster.address``, or one that the sweep
starts here, so that a GPU is given to one run at a time.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from eopd.config import Config, ConfigError, UnavailableError, dump_config
from eopd.config.choices import with_choices_of
from eopd.preflight import pinned, prepare
from eopd.run.changes import Change, changes
from eopd.run.directory import RunDirectory
from eopd.run.grid import Grids, Status, SweepRun
from eopd.run.lock import held, holder
from eopd.run.results import FILE, ArmResult, errors_before, write_sweep
from eopd.run.storage import write_whole
from eopd.runtime.inputs import digests
from eopd.runtime.resume import take_up
from eopd.runtime.signals import ASK_TO_END, Requests, caught
from eopd.runtime.sweep_room import OpenRoom, Room, Say, named, room_of
from eopd.telemetry.report.page import write_report

TRAIN: Final = (sys.executable, "-m", "eopd", "train")
MAY_CHANGE: Final = ("run.batches",)  # a sweep can be made longer
COMPUTED: Final = ("noted", "never")  # kinds of changes to what is computed
ENDED: Final = ("completed", "collapsed")
INTERRUPTED: Final = 130
_OTHERS_SHOWN: Final = 3
_LONGEST_ERROR: Final = 500


class Sweep:
    """The runs of a sweep, and what became of them.

    Args:
        directory: of the sweep.
        runs: in the order in which they are run.
        grids: for ``sweep.json``.
        say: is told what happens.
        train: the command that trains a config.
        open_room: holds what the runs share, and says where they find room, from the runs, the most
            that run side by side, and ``say``.
    """

    def __init__(
        self,
        directory: Path,
        runs: Sequence[SweepRun],
        grids: Grids,
        say: Say,
        train: Sequence[str] = TRAIN,
        open_room: OpenRoom | None = None,
    ) -> None:
        self.directory = directory
        self.runs = runs
        self.report = directory / "report.html"
        self.interrupted = False
        self.lack: str | None = None  # of which run, and what the cluster has not for it
        self._grids = grids
        self._say = say
        self._train = train
        self._open_room = open_room or room_of
        self._requests = Requests()
        self._running: dict[asyncio.Task[None], SweepRun] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def status(self) -> Literal["completed", "failed", "interrupted"]:
        """Returns what became of the sweep; a run that collapsed has ended in order."""
        if all(run.status in ENDED for run in self.runs):
            return "completed"

        return "failed" if self.failed and not self.interrupted else "interrupted"

    @property
    def failed(self) -> list[SweepRun]:
        """Returns the runs that failed."""
        return [run for run in self.runs if run.status == "failed"]

    def run(self, parallel: int) -> list[ArmResult]:
        """Checks every run, then runs those that are not complete, at most ``parallel`` at a time.

        Raises:
            ConfigError: a run cannot be run, or this sweep is being run already; nothing was started.
        """
        with held(self.directory, "--name"):
            self._check(parallel)
            with self._open_room(self.runs, parallel, self._say) as room:
                self._begin()
                asyncio.run(self._run_all(room, parallel))

            return self._end()

    def _check(self, parallel: int) -> None:
        """Checks every run, and finds out which are complete.

        Raises:
            ConfigError: one has a mistake; the message begins with its name.
        """
        if RunDirectory(self.directory).holds_a_run():
            raise ConfigError(f"--name: {self.directory} is a run; choose another name")

        self._pin()
        before = errors_before(self.directory / FILE)
        for run in self.runs:
            with named(run.name):
                run.status = _status_of(run.config, parallel)

            if run.status == "waiting" and run.name in before:
                error = before[run.name]
                self._say(f"{run.name}: failed before ({error}); it is tried again")

        if others := self._others():
            some = ", ".join(others[:_OTHERS_SHOWN]) + (", ..." if others[_OTHERS_SHOWN:] else "")
            self._say(
                f"note: other runs lie in {self.directory} too, {len(others)} of them, which are not of "
                f"this command: its table, {FILE} and its report leave them out ({some})"
            )

        if done := sum(run.status in ENDED for run in self.runs):
            self._say(f"{done} of {len(self.runs)} runs are complete")

    def _others(self) -> list[str]:
        """Returns the names of runs of an earlier command, of which this one has not all arms or seeds."""
        mine = {run.directory.path for run in self.runs}
        runs = (config.parent for config in self.directory.glob("*/config.yaml"))
        return sorted(path.name for path in runs if path not in mine)

    def _pin(self) -> None:
        """Puts the same commits behind the names of models and data in all runs: those that the first
        run of the sweep began with.
        """
        begun = [run.directory for run in self.runs if run.directory.holds_a_run()]
        before = begun[0].config() if begun else None
        for run in self.runs:
            with named(run.name):
                run.config = pinned(run.config, before)

            before = before or run.config

    async def _run_all(self, room: Room, parallel: int) -> None:
        """Runs what waits, as far as there is room; after a signal nothing more is begun."""
        with caught(self._interrupt, asyncio.current_task()):
            try:
                await self._take_turns(room, parallel)
            finally:
                if self._running:  # something went wrong here: no run is left behind
                    self._interrupt()
                    await asyncio.wait(self._running)

    async def _take_turns(self, room: Room, parallel: int) -> None:
        waiting = deque(run for run in self.runs if run.status == "waiting")

        def is_next() -> bool:
            if not waiting or self.interrupted or self.lack or len(self._running) == parallel:
                return False

            beside = [run.config for run in self._running.values()]
            return not beside or room.has([*beside, waiting[0].config])

        while self._running or is_next():
            while is_next():
                run = waiting.popleft()
                self._running[asyncio.create_task(self._run(run, room))] = run

            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                run = self._running.pop(task)
                task.result()
                self._tell(run)

    async def _run(self, run: SweepRun, room: Room) -> None:
        """Runs one run to its end."""
        run.status = "running"
        self._say(f"{run.name}: starts; its output is in {run.log}")
        self._write("running")
        with run.log.open("ab") as log:
            start = log.tell()  # an earlier attempt may have written before it
            process = await asyncio.create_subprocess_exec(
                *self._train,
                str(self._config_of(run)),
                "--resume",
                "auto",
                *room.options,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **room.environment},
                start_new_session=True,  # Ctrl-C of a terminal reaches it through the sweep
            )

        self._processes[run.name] = process
        if self.interrupted:
            process.send_signal(signal.SIGINT)

        code = await process.wait()
        del self._processes[run.name]
        if code == UnavailableError.exit_code:  # the next one would find no cluster either
            run.status = "waiting"
            self.lack = f"{run.name}: {_last_error(run.log.read_bytes()[start:])}"
            return

        run.status, run.error = _outcome(run, code, start, is_asked=self.interrupted)

    def _interrupt(self, number: int | None = None) -> bool:
        """Passes a signal on to the runs: the first ends them after a step, the next at once."""
        if not self._requests.add(number):
            return True

        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGINT)

        again = "once more to end them at once"
        self._say("ending the runs at once" if self.interrupted else f"ending the runs; {again}")
        self.interrupted = True
        return True

    def _tell(self, run: SweepRun) -> None:
        ended = sum(each.status not in ("waiting", "running") for each in self.runs)
        why = f": {run.error}; see {run.log}" if run.error else ""
        if run.status == "waiting":
            why = "; the cluster is not to be had for it now, and no other run is begun"

        self._say(f"{run.name}: {run.status}{why} ({ended} of {len(self.runs)} runs)")
        self._write("running")

    def _begin(self) -> None:
        """Writes the configs of the runs, and the first ``sweep.json``."""
        for run in self.runs:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            self._config_of(run).parent.mkdir(exist_ok=True)
            write_whole(self._config_of(run), dump_config(run.config))

        self._write("running")

    def _end(self) -> list[ArmResult]:
        """Writes the last ``sweep.json`` and the report."""
        shown = [run.directory for run in self.runs if run.directory.num_steps()]
        if shown:
            try:
                write_report([directory.path for directory in shown], self.report)
            except ConfigError as error:
                self._say(f"no report: {error}")

        return self._write(self.status)

    def _config_of(self, run: SweepRun) -> Path:
        return self.directory / "configs" / f"{run.name}.yaml"

    def _write(self, status: str) -> list[ArmResult]:
        return write_sweep(self.directory / FILE, self.runs, self._grids, status)


def _status_of(config: Config, parallel: int) -> Status:
    """Returns whether a run waits or has ended, as ``eopd train --resume auto`` would find it.

    Raises:
        ConfigError: it cannot be run.
    """
    port = config.telemetry.port
    if parallel > 1 and port:
        raise ConfigError(
            f"telemetry.port: {port} can be opened by one run at a time; for --parallel "
            f"{parallel} set it to 0, which takes a free one"
        )

    directory, prepared = RunDirectory(config.run.path), prepare(config)
    if other := holder(directory.path):
        raise ConfigError(f"{directory.path} is being run by {other}")

    summary = directory.read_summary()
    if summary is not None and summary.status == "collapsed":  # which cannot be taken up
        _require_same(directory, config, ())
        return "collapsed"

    taken_up = take_up(config, digests(config, prepared), "auto")
    if directory.num_steps():
        _require_same(directory, config, taken_up.changes)

    return "completed" if taken_up.complete else "waiting"


def _require_same(directory: RunDirectory, config: Config, noted: Sequence[Change]) -> None:
    """Raises ConfigError where a run would go on, or be counted, under other settings than before."""
    before = directory.config()
    changed = changes(before, with_choices_of(before, config))
    computed = [each for each in (*changed, *noted) if each.kind in COMPUTED]
    others = {str(each): None for each in computed if each.key not in MAY_CHANGE}
    if others:
        raise ConfigError(
            f"{directory.path} was begun with other settings: {'; '.join(others)}. Put them "
            "back, or begin another sweep with --name"
        )


def _outcome(run: SweepRun, code: int, start: int, *, is_asked: bool) -> tuple[Status, str | None]:
    """Returns what became of a run whose process has ended, and its error. Its output begins at byte
    ``start`` of the log, and it may have been asked to end, also while it started.
    """
    if code in (0, INTERRUPTED):
        return ("interrupted" if code else "completed"), None

    try:
        summary = run.directory.read_summary()
    except ConfigError as error:
        return "failed", str(error)

    if summary is not None and summary.status == "collapsed":
        return "collapsed", None

    if code < 0:
        done = ("completed", run.config.run.batches)
        is_done = summary is not None and (summary.status, summary.steps) == done
        if is_done and run.config.run.upload is None:  # it had only to exit
            return "completed", None

        if is_asked and -code in ASK_TO_END:
            return "interrupted", None

        return "failed", f"killed by {signal.Signals(-code).name}"

    return "failed", _last_error(run.log.read_bytes()[start:]) or f"exit code {code}"


def _last_error(output: bytes) -> str:
    """Returns the last error in the output of a run, or else its last line."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    written = [line for line in lines if line]
    errors = [line.removeprefix("error: ") for line in written if line.startswith("error: ")]
    return next(reversed(errors or written), "")[:_LONGEST_ERROR]
