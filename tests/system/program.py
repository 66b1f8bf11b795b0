"""The program as a user runs it, what it left running, and a run whose processes can be found
and killed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from eopd.runtime.placement import EAGER

ROOT = Path(__file__).parents[2]
STEP_S = 300


@dataclass
class Program:
    """``eopd`` as a process of its own; whatever it starts inherits ``mark`` in its environment."""

    models: Path
    runs: Path
    inside: tuple[str, ...] = ()  # what begins a command
    mark: str = field(default_factory=lambda: f"EOPD_TEST_{uuid.uuid4().hex}")

    def environment(self) -> dict[str, str]:
        """A user's environment, marked."""
        return {
            k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_", *EAGER))
        } | {self.mark: "1"}

    def start(self, *arguments: str, log: Path | None = None) -> "subprocess.Popen[str]":
        """``log`` takes the output of a long run: a pipe that nobody reads fills, and then
        the run stands still.
        """
        command = [*self.inside, str(Path(sys.executable).with_name("eopd")), *arguments]
        env = self.environment()
        out, err = (
            (subprocess.PIPE, subprocess.PIPE)
            if log is None
            else (log.open("w"), subprocess.STDOUT)
        )

        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout_s: float = 400) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise

        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def train(self, name: str, *overrides: str, config: str = "configs/tiny.yaml") -> list[str]:
        settings = [
            f"run.name={name}",
            f"run.directory={self.runs}",
            f"student.model={self.models / 'student'}",
            f"teachers.0.model={self.models / 'teacher'}",
            "cluster.cpus=2",
            *overrides,
        ]
        return ["train", config, *(part for setting in settings for part in ("--set", setting))]

    def left_behind(self, grace_s: float = 20.0) -> list[str]:
        """Processes that still carry the mark; those that are on their way out get a moment."""
        deadline = time.monotonic() + grace_s
        while self.marked() and time.monotonic() < deadline:
            time.sleep(0.5)

        left = []
        for process in self.marked():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                left.append(" ".join(process.cmdline()))

        return left

    def marked(self) -> list[psutil.Process]:
        """Processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if self.mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

        return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that is being written, or is not there yet; half a line at its
    end is none.
    """
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def lost(row: dict[str, Any]) -> float:
    """How many trajectories a run had lost."""
    return sum(
        value for name, value in row.items() if name.startswith("eopd_lost_trajectories_total")
    )


class Run:
    """A run under way, and its processes."""

    def __init__(
        self,
        program: Program,
        name: str,
        *overrides: str,
        config: str = "configs/tiny.yaml",
        options: Sequence[str] = (),
    ) -> None:
        self.program = program
        self.directory = program.runs / name
        self.log = program.runs.parent / f"{name}.log"
        command = [*program.train(name, *overrides, config=config), *options]
        self.process = program.start(*command, log=self.log)

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.directory / "metrics.jsonl")

    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    def actors(self, role: str) -> list[psutil.Process]:
        """Processes of the actors of a role, in the order they were started."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.name().startswith(f"ray::{role}"[:15])
                    and self.program.mark in process.environ()
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

        return sorted(found, key=lambda process: process.create_time())

    def engine(self) -> psutil.Process:
        """The process of the first engine, once it is there, where engines are no threads."""
        deadline = time.monotonic() + STEP_S
        while True:
            with suppress(psutil.NoSuchProcess):  # what it looks at may have just ended
                for actor in self.actors("RolloutActor"):
                    for child in actor.children(recursive=True):
                        if "EngineCore" in child.name():
                            return child

            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)

    def wait(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The last row, once ``ready`` of it."""
        deadline = time.monotonic() + STEP_S
        while not ((found := self.rows()) and ready(found[-1])):
            assert self.process.poll() is None and time.monotonic() < deadline, (
                self.log.read_text()[-3000:]
            )
            time.sleep(0.1)

        return found[-1]

    def says(self, pattern: str, *, after: int) -> re.Match[str]:
        """The first text that fits a pattern, behind so many characters of what the run has said."""
        deadline = time.monotonic() + STEP_S
        while not (found := re.search(pattern, self.log.read_text()[after:], re.M)):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

        return found

    def goes_on(self, steps: int = 3) -> dict[str, Any]:
        """Wait for some more steps than there are."""
        step = self.rows()[-1]["step"]
        return self.wait(lambda row: row["step"] >= step + steps)

    def ended(self, code: int) -> str:
        """Wait for its end; what the run has said."""
        assert self.process.wait(timeout=120) == code, self.log.read_text()[-3000:]
        return self.log.read_text()

    def interrupt(self) -> str:
        """Ctrl-C, which a terminal sends to every process of the group; what the run has said."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.ended(130)

    def close(self) -> None:
        """Interrupt a run that a failing test left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(timeout=120)
