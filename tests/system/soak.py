"""Half an hour of training with a fault every minute: what is lost, what leaks. Not a test of CI:
``make soak``.

One process after the other is killed or stopped: engines, teachers and learner ranks, and all but
one of the engines at once, as if their node were gone. One prompt is poisonous: no teacher scores
it. The driver lives through it all, so that what it holds at the end can be compared with the
beginning.
"""

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer
from program import ROOT, Program, Run, read_rows
from refusing_server import refusing_server, teachers

from eopd.models.tiny import write_tiny_pair

SAMPLE_S, STOPPED_S = 5.0, 60.0
POISON = {"id": "poison", "prompt": "Say nothing.", "source": "poison"}
SETTINGS = (
    "run.batches=100000",
    "flow={batch_prompts: 8, max_staleness: 1}",
    "learner.token_budget=152",  # so that batches come in parts
    "rollout.engines=3",
    "checkpoint.every=10",
    "evaluation.prompts=8",
    "rollout.timeout_s=60",
    "learner.timeout_s=120",
    "weights={connect_timeout_s: 10, timeout_s: 10, verify_every: 5}",
    "cluster.max_restarts=1000",
)
# The last third may hold more than the first by so much: pages that the allocator keeps, and no
# more.
ALLOWED = {
    "driver RSS, MiB": 30.0,
    "driver files": 8.0,
    "processes": 2.0,
    "object store, MiB": 5.0,
    "all RSS, MiB": 400.0,
}


def lose_node(run: Run) -> None:
    """All engines but one die in the same moment."""
    for actor in run.actors("RolloutActor")[1:]:
        actor.kill()


def stop(actor: psutil.Process) -> None:
    """It stands still. Ray 2.60 asks it to end, and does not always kill what cannot answer."""
    actor.suspend()
    threading.Timer(STOPPED_S, lambda: actor.is_running() and actor.kill()).start()


FAULTS: dict[str, Callable[[Run], None]] = {
    "engine's actor killed": lambda run: pick(run, "RolloutActor").kill(),
    "engine's actor stopped": lambda run: stop(pick(run, "RolloutActor")),
    "node of two engines lost": lose_node,
    "teacher's actor killed": lambda run: pick(run, "TeacherActor").kill(),
    "learner's rank killed": lambda run: pick(run, "LearnerActor").kill(),
}


def pick(run: Run, role: str) -> psutil.Process:
    return random.choice(run.actors(role))


@dataclass
class Soak:
    """One run and what was seen of it."""

    run: Run
    faults: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ALLOWED})

    def bear(self, minutes: float, every_s: float) -> None:
        """Sample all the time, and bring in a fault every so often."""
        ends = time.monotonic() + 60 * minutes
        next_fault = time.monotonic() + every_s
        waiting = list[str]()
        while time.monotonic() < ends:
            assert self.run.process.poll() is None, self.run.log.read_text()[-3000:]
            self._sample()
            if time.monotonic() >= next_fault:
                waiting = waiting or random.sample(list(FAULTS), len(FAULTS))
                self._bring_in(waiting.pop())
                next_fault += every_s

            time.sleep(SAMPLE_S)

    def _bring_in(self, fault: str) -> None:
        try:
            FAULTS[fault](self.run)
            self.faults[fault] += 1
        # the one before it is still being mended
        except (IndexError, psutil.NoSuchProcess):
            fault += " (there was none)"

        typer.echo(f"{time.strftime('%H:%M:%S')} step {self.run.rows()[-1]['step']}: {fault}")

    def _sample(self) -> None:
        driver = psutil.Process(self.run.process.pid)
        seen = {
            "driver RSS, MiB": driver.memory_info().rss / 2**20,
            "driver files": driver.num_fds(),
            "processes": len(self.run.program.marked()),
            "object store, MiB": self.run.rows()[-1]["eopd_object_store_bytes"] / 2**20,
            "all RSS, MiB": sum(memory(process) for process in self.run.program.marked()) / 2**20,
        }
        for name, value in seen.items():
            self.samples[name].append(float(value))

    def report(self) -> list[str]:
        """Print what was seen; returns what is wrong."""
        wrong = []
        typer.echo(
            f"{'':24}{'first third':>14}{'last third':>14}{'most':>10}{'allowed to grow':>18}"
        )

        for name, values in self.samples.items():
            third = len(values) // 3
            first = statistics.median(values[:third])
            last = statistics.median(values[-third:])
            typer.echo(
                f"{name:24}{first:14.1f}{last:14.1f}{max(values):10.1f}{ALLOWED[name]:18.1f}"
            )
            if last - first > ALLOWED[name]:
                wrong.append(f"{name} grew from {first:.1f} to {last:.1f}")

        rows = self.run.rows()
        names = (
            "engine_replacements",
            "teacher_replacements",
            "learner_restarts",
            "weight_failures",
        )

        last = rows[-1]
        for name in names:
            counts = [n for key, n in last.items() if key.startswith(f"eopd_{name}_total")]
            typer.echo(f"{name:24}{sum(counts):14.0f}")

        dropped = last["eopd_dropped_trajectories_total"]
        typer.echo(f"{'dropped trajectories':24}{dropped:14.0f}")
        lost = sum(
            value
            for name, value in rows[-1].items()
            if name.startswith("eopd_lost_trajectories_total")
        )
        typer.echo(f"{'lost trajectories':24}{lost:14.0f}\n{'steps':24}{len(rows):14}")
        for fault, count in self.faults.items():
            typer.echo(f"{fault:24}{count:14}")

        return wrong + self._ledger(rows)

    def _ledger(self, rows: list[dict[str, float]]) -> list[str]:
        """Every step once, every issue number once."""
        path = self.run.directory / "trained.jsonl"
        trained = [json.loads(line) for line in path.read_text().splitlines()]
        wrong = []
        dropped = read_rows(self.run.directory / "dropped.jsonl")
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            wrong.append("metrics.jsonl does not hold every step once")

        settled = [issue for row in trained for issue in row["issues"]]
        settled += [row["issue"] for row in dropped if row["issue"] < max(settled)]
        if sorted(settled) != list(range(len(settled))):
            wrong.append("trained.jsonl and dropped.jsonl do not hold every issue number once")

        if {row["prompt_id"] for row in dropped} != {POISON["id"]}:
            wrong.append("another prompt than the poisonous one was dropped, or none")

        if max(row["eopd_staleness_max"] for row in rows) > 1:
            wrong.append("a trajectory was staler than max_staleness")

        return wrong


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    every: Annotated[float, typer.Option(help="Seconds between two faults.")] = 60.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, kill, and report."""
    random.seed(seed)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_tiny_pair(root / "models", family="qwen3")
        program = Program(models=root / "models", runs=root / "runs")
        config = json.loads((root / "models" / "teacher" / "config.json").read_text())
        server = stack.enter_context(refusing_server(vocab_size=config["vocab_size"]))
        data = root / "prompts.jsonl"
        data.write_text(
            (ROOT / "configs/prompts/demo_train.jsonl").read_text() + json.dumps(POISON) + "\n"
        )
        of_teachers = teachers(server, root / "models" / "teacher", replicas=1)
        soak = Soak(Run(program, "soak", *SETTINGS, f"prompts.data={data}", of_teachers))

        try:
            soak.run.wait(lambda row: row["step"] >= 5)
            soak.bear(minutes, every)
            soak.run.goes_on()
            soak.run.interrupt()
        except BaseException:
            soak.run.process.terminate()
            typer.echo(soak.run.log.read_text()[-5000:])
            raise

        wrong = soak.report() + [f"left running: {line}" for line in program.left_behind()]

    for line in wrong:
        typer.echo(f"WRONG: {line}")

    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
