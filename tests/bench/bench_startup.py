"""From ``eopd train`` to the first step: seconds on the clock, and the CPU seconds of every process
until then.

Start-up is importing torch, transformers and vLLM, once a process, and there are several to a core:
CPU seconds tell what a process costs whatever else the machine does, the clock tells what a user
waits. Two runs, since the first one may compile Python files and read them from disk.

    python tests/bench/bench_startup.py configs/tiny.yaml --bar 45
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "system"))
from program import Program  # noqa: E402

LOOK_S = 0.2
MODELS = Path("~/.cache/eopd/models").expanduser()


class Clocks:
    """CPU seconds of every process of a run, as last seen."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        for process in self._program.marked():
            try:
                times = process.cpu_times()
                self._seen[process.pid] = (_name(process), times.user + times.system)
            except psutil.Error:
                continue

    def rows(self) -> list[tuple[str, float]]:
        """Names and seconds, the dearest first."""
        return sorted(self._seen.values(), key=lambda row: -row[1])


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    title = process.name() if not words else words[0]
    if title.startswith(("ray::", "VLLM::")):
        return title.split()[0]

    return " ".join(Path(word).name for word in words[:3])[:48]


def first_step(config: str, number: int, root: Path) -> float:
    """Start a run, end it after its first step, print where the time went.

    Returns:
        Seconds from the command to the first step.
    """
    program = Program(models=MODELS / "tiny", runs=root / "runs")
    settings = [f"run.directory={program.runs}", f"run.name=start-{number}", "evaluation.prompts=2"]
    arguments = ["train", config, *(part for setting in settings for part in ("--set", setting))]
    clocks, started = Clocks(program), time.monotonic()
    process = program.start(*arguments, log=root / f"{number}.log")
    rows = program.runs / f"start-{number}" / "metrics.jsonl"

    try:
        while not (rows.exists() and rows.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit((root / f"{number}.log").read_text(encoding="utf-8"))

            clocks.look()
            time.sleep(LOOK_S)

        seconds = time.monotonic() - started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=120)

    seen = clocks.rows()
    lines = [f"run {number}: {seconds:.1f} s to the first step"]
    lines += [f"  {cpu:6.1f} CPU s  {name}" for name, cpu in seen if cpu >= 0.5]
    lines.append(f"  {sum(cpu for _, cpu in seen):6.1f} CPU s  in all, {os.cpu_count()} cores")
    sys.stdout.write("\n".join(lines) + "\n")

    return seconds


def main() -> None:
    """Start twice; exit 1 above the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument(
        "--bar",
        type=float,
        default=float("inf"),
        help="seconds that the last run may take",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        seconds = [
            first_step(
                options.config,
                number,
                Path(root),
            )
            for number in range(options.runs)
        ]

    sys.exit(seconds[-1] > options.bar)


if __name__ == "__main__":
    main()
