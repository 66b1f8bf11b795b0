"""A step of ours beside a step of TRL's trainers, on the same machine, models, prompts and tokens.

TRL is installed into a folder of its own (``make bench-peers`` does that), and runs with the torch and
transformers that are here. Everybody samples ``--batch``
responses of at most ``--tokens`` tokens with the student, scores them with the teacher, and makes
one AdamW step; the learning rate is so small that responses stay as long as they are. Ours runs
twice: synchronous, and with ``max_staleness`` 2. The first steps, which warm everything up, are left
out. Memory is the largest sum of PSS over all processes of a side, looked at every second.

The figure is response tokens a second, and the bar is what ours must reach of the better of TRL's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "system"))
from program import Program, Run  # noqa: E402

from eopd.config.processor import choose_dtype, processor_flags  # noqa: E402

MODELS = Path("~/.cache/eopd/models").expanduser()
STUDENT, TEACHER = MODELS / "smollm2-26-layers", MODELS / "smollm2-135m"
PROMPTS = ROOT / "configs" / "prompts" / "demo_train.jsonl"
LR, WARM_UP = 1e-6, 2
BARS = {"ours, synchronous": 1.2, "ours, max_staleness 2": 1.4}


@dataclass(frozen=True)
class Step:
    seconds: float
    tokens: float


class Memory:
    """The largest sum of PSS that was seen, in bytes."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def watched(self, processes: Callable[[], Iterable[psutil.Process]]) -> Iterator[None]:
        """Looks at the processes every second while the block runs."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                self.peak = max(self.peak, sum(map(_pss, processes())))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


def ours(options: argparse.Namespace, staleness: int, memory: Memory) -> list[Step]:
    """Steps of a run from the demo's config."""
    with tempfile.TemporaryDirectory() as runs:
        run = Run(
            Program(models=MODELS, runs=Path(runs)),
            "peers",
            f"student.model={STUDENT}",
            f"teachers.0.model={TEACHER}",
            f"flow={{batch_prompts: {options.batch}, max_staleness: {staleness}}}",
            f"rollout.max_response_tokens={options.tokens}",
            f"learner={{cpus: 1, threads: 2, token_budget: 1024, lr: {LR}}}",
            "run.batches=10000",
            "evaluation.prompts=2",
            "checkpoint.every=10000",
            config="configs/demo.yaml",
        )
        try:
            with memory.watched(run.program.marked):
                for step in range(1, WARM_UP + options.steps + 1):  # each has its own time-out
                    run.wait(lambda row, step=step: row["step"] >= step)

            rows = run.rows()[WARM_UP : WARM_UP + options.steps]
        finally:
            run.interrupt()

    return [
        Step(
            row["eopd_step_seconds"],
            row["eopd_step_seconds"] * row["eopd_response_tokens_per_second"],
        )
        for row in rows
    ]


def trl(options: argparse.Namespace, trainer: str, memory: Memory) -> list[Step]:
    """Steps of one of TRL's trainers."""
    command = [
        *(sys.executable, Path(__file__).parent / "peers" / "trl_trainer.py", trainer),
        *(STUDENT, TEACHER, PROMPTS, "--lr", LR),
        *("--batch", options.batch, "--tokens", options.tokens),
        *("--steps", WARM_UP + options.steps),
    ]
    dtype, _ = choose_dtype(gpus=0, flags=processor_flags(), environment=os.environ)
    if dtype == "bfloat16":
        command.append("--bf16")

    with subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(options.trl)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        root = psutil.Process(process.pid)
        with memory.watched(lambda: [root, *root.children(recursive=True)]):
            printed = process.stdout.read() if process.stdout else ""

    if process.returncode:
        raise SystemExit(f"TRL's {trainer} trainer ended with {process.returncode}: run {command}")

    lines = [line for line in printed.splitlines() if line.startswith('{"seconds"')]
    steps = [Step(**json.loads(line)) for line in lines]
    return steps[WARM_UP:]


def main() -> None:
    """A line for each side, and the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, required=True, help="the folder it is installed in")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    sides: dict[str, Callable[[Memory], list[Step]]] = {
        "TRL DistillationTrainer": lambda memory: trl(options, "distillation", memory),
        "ours, synchronous": lambda memory: ours(options, 0, memory),
        "TRL GKDTrainer": lambda memory: trl(options, "gkd", memory),
        "ours, max_staleness 2": lambda memory: ours(options, 2, memory),
    }
    rates: dict[str, float] = {}
    sys.stdout.write("| side | seconds a step | tokens/s | memory, GB |\n|---|---|---|---|\n")

    for side, measure in sides.items():
        memory = Memory()
        steps = measure(memory)
        seconds = statistics.median(step.seconds for step in steps)
        rates[side] = sum(step.tokens for step in steps) / sum(step.seconds for step in steps)
        sys.stdout.write(
            f"| {side} | {seconds:.2f} | {rates[side]:.1f} | {memory.peak / 1e9:.1f} |\n"
        )
        sys.stdout.flush()

    best = max(rate for side, rate in rates.items() if side.startswith("TRL"))
    shares = {side: rates[side] / best for side in BARS}
    for side, bar in BARS.items():
        verdict = "ok" if shares[side] >= bar else "MISS"
        sys.stdout.write(f"{side}: {shares[side]:.2f} of TRL's better, at least {bar}: {verdict}\n")

    sys.exit(any(shares[side] < bar for side, bar in BARS.items()))


if __name__ == "__main__":
    main()
