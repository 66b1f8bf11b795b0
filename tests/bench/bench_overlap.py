"""How much of this machine a run uses when its stages overlap: real engines, teacher and learner on
shared cores.

Stages that share cores cannot be faster together than their CPU time allows. So CPU seconds of
every role are measured for a token that is trained on, its processes and their children, in a
synchronous run and in one with ``max_staleness`` 2; the lower sum counts, since a process that
waits burns some too. ``cores`` cores can then train at most ``cores / sum`` tokens a second, and
the run that overlaps must reach 0.85 of that. Both runs take the same prompts; the first steps,
which warm everything up, are left out. The seconds of a step are explained by the metrics of its
row.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "system"))
from program import Program, Run  # noqa: E402

BAR, WARM_UP = 0.85, 3
ROLES = {"RolloutActor": "rollout", "TeacherActor": "teacher", "LearnerActor": "learner"}
PARTS = ("wait_rollout", "wait_teacher", "train", "weights")
MODELS = Path("~/.cache/eopd/models").expanduser()


@dataclass
class Seen:
    """One run after its warm-up: tokens, seconds, CPU seconds by role, and the rows."""

    tokens: float
    seconds: float
    cpu: Counter[str]
    rows: list[dict[str, float]]

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on a second."""
        return self.tokens / self.seconds


def cpu_by_role(run: Run) -> Counter[str]:
    """CPU seconds so far of the run's processes, each put down to the actor above it, or to
    the driver and Ray.
    """
    seen: Counter[str] = Counter()
    marked = {process.pid: process for process in run.program.marked()}

    for process in marked.values():
        try:
            chain = [process, *process.parents()]
            names = [one.name() for one in chain if one.pid in marked]
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue

        role = next(
            (ROLES[n] for name in names for n in ROLES if name.startswith(f"ray::{n}"[:15])),
            "driver, Ray",
        )
        seen[role] += times.user + times.system

    return seen


def measure(program: Program, staleness: int, batches: int) -> Seen:
    """Train, and look at the clocks after the warm-up and before the last step."""
    settings = [
        f"student.model={MODELS / 'smollm2-26-layers'}",
        f"teachers.0.model={MODELS / 'smollm2-135m'}",
        f"flow={{batch_prompts: 8, max_staleness: {staleness}}}",
        "run.batches=10000",
        "evaluation.prompts=2",
        "checkpoint.every=10000",
    ]
    run = Run(program, f"staleness-{staleness}", *settings, config="configs/demo.yaml")

    try:
        first = run.wait(lambda row: row["step"] >= WARM_UP)
        cpu = cpu_by_role(run)
        last = run.wait(lambda row: row["step"] >= first["step"] + batches)
        cpu_after = cpu_by_role(run)
        seconds = last["time"] - first["time"]
        rows = [row for row in run.rows() if first["step"] < row["step"] <= last["step"]]
    finally:
        run.interrupt()

    tokens = last["eopd_response_tokens_total"] - first["eopd_response_tokens_total"]

    return Seen(
        tokens,
        seconds,
        Counter({role: cpu_after[role] - cpu[role] for role in cpu_after}),
        rows,
    )


def show(name: str, seen: Seen) -> None:
    """What a step's seconds and a token's CPU went to."""
    steps = len(seen.rows)

    def seconds_a_step(part: str) -> float:
        return sum(row[f"eopd_{part}_seconds"] for row in seen.rows) / steps

    step_s = seconds_a_step("step")
    parts = ", ".join(f"{part} {seconds_a_step(part):.2f}" for part in PARTS)
    cpu = ", ".join(
        f"{role} {1000 * seconds / seen.tokens:.2f}" for role, seconds in sorted(seen.cpu.items())
    )
    sys.stdout.write(
        f"{name}: {seen.tokens_per_s:.1f} tokens/s; a step took {step_s:.2f} s: {parts}\n"
    )
    sys.stdout.write(f"    CPU ms a token: {cpu}\n")


def main() -> None:
    """Two runs, one line each, and the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        program = Program(models=MODELS, runs=Path(temporary))
        synchronous, overlapping = (
            measure(program, staleness, options.batches) for staleness in (0, 2)
        )

    cores = len(os.sched_getaffinity(0))
    allowed = cores / min(
        sum(seen.cpu.values()) / seen.tokens for seen in (synchronous, overlapping)
    )
    share = overlapping.tokens_per_s / allowed
    show("max_staleness 0", synchronous)
    show("max_staleness 2", overlapping)
    verdict = "ok" if share >= BAR else "MISS"
    sys.stdout.write(
        f"{cores} cores allow {allowed:.1f} tokens/s; reached {share:.2f} of that, at least "
        f"{BAR}: {verdict}\n"
    )
    sys.stdout.write(
        json.dumps(
            {"share": share, "speed-up": overlapping.tokens_per_s / synchronous.tokens_per_s}
        )
        + "\n"
    )
    sys.exit(share < BAR)


if __name__ == "__main__":
    main()
