"""Runs the program as a user does, and finds what it left running."""

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Program:
    """``eopd`` as a process of its own; whatever it starts inherits ``mark`` in its environment."""

    models: Path
    runs: Path
    mark: str = field(default_factory=lambda: f"EOPD_TEST_{uuid.uuid4().hex}")

    def environment(self) -> dict[str, str]:
        """A user's environment, marked."""
        return {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_"))} | {self.mark: "1"}

    def start(self, *arguments: str, log: Path | None = None) -> "subprocess.Popen[str]":
        """``log`` takes the output of a long run: a pipe that nobody reads fills, and then the run stands still."""
        command = [str(Path(sys.executable).with_name("eopd")), *arguments]
        env = self.environment()
        out, err = (subprocess.PIPE, subprocess.PIPE) if log is None else (log.open("w"), subprocess.STDOUT)
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=out, stderr=err, start_new_session=True)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
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
        while (found := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _marked(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if self.mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Program:
    from eopd.models.tiny import write_tiny_pair

    root = tmp_path_factory.mktemp("system")
    write_tiny_pair(root / "models", family=os.environ.get("EOPD_TEST_FAMILY", "qwen3"))
    return Program(models=root / "models", runs=root / "runs")


@pytest.fixture(scope="session")
def synchronous(program):
    """One run from beginning to end; shared."""
    done = program.run(*program.train("synchronous"))
    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "synchronous", done.stdout
