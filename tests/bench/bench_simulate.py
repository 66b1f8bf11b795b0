"""Seconds of a step that ``eopd plan --simulate`` tells, beside those of real runs and real sleeps.

**run**: tiny models are trained for 30 steps, once with ``max_staleness`` 0 and once with 1. Rates,
lengths and the seconds of a publish are those of the run's own ``metrics.jsonl`` without its first
steps, and without those that follow a checkpoint: response tokens over the seconds in which a stage
was at work. They go into a simulation with the workers of the config. Where steps are synchronous
that is the rate of a batch written at once, to its last response, as ``eopd profile`` has it. Where
they overlap the engines always write, and it is the rate of full engines. A third row foretells the
steps that overlap from the rates of the synchronous run: on machines with few cores stages disturb
each other, which no rate of a stage alone can know. ``--runs A B`` takes two runs that are there.

**loop**: the loop on the paced fakes of ``bench_pipeline.py``, by a real clock and in virtual time.
Both have the same draws, so what differs is what the driver's own work and late timers cost.

Needs the tiny models: ``eopd models tiny``.
"""

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_pipeline import ENGINES, FLOWS, WARM_UP, Engine, Flow, paced_pipeline

from eopd.config import Config, load_config
from eopd.planning.balance import counts_of
from eopd.planning.lengths import Lengths
from eopd.planning.needs import Hardware
from eopd.planning.simulate import Simulation, full_rates, simulate
from eopd.planning.virtual import VirtualLoop
from eopd.planning.workers import Work

ROOT = Path(__file__).parents[2]
HARDWARE = Hardware(gpu_bytes=80 * 10**9)
BAR = 0.15
BETWEEN_S = 0.05  # a longer time between two steps is that of a checkpoint
NORMAL_95 = 1.645
PARTS = ("wait_rollout", "wait_teacher", "train", "weights")
Row = dict[str, float]


def train(staleness: int, directory: Path) -> Path:
    run = directory / f"staleness-{staleness}"
    settings = {
        "run.directory": directory,
        "run.name": run.name,
        "run.batches": 30,
        "flow.max_staleness": staleness,
        "checkpoint.every": 30,
        "evaluation.every": "null",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "eopd", "train", "configs/tiny.yaml", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run


def rows_of(run: Path) -> list[Row]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows[WARM_UP:] if row["eopd_between_steps_seconds"] < BETWEEN_S]


def mean(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def work_of(config: Config, rows: list[Row]) -> Work:
    """Rates, lengths and publishes of a run, from its rows."""
    tokens = mean(rows, "eopd_response_tokens_mean") * config.batch_trajectories
    rates = {
        stage: tokens / count / mean(rows, f"eopd_{stage}_seconds")
        for stage, count in counts_of(config).items()
    }
    median, high = (mean(rows, f'eopd_response_tokens_quantile{{q="{q}"}}') for q in (0.5, 0.95))
    lengths = Lengths(
        tokens / config.batch_trajectories,
        math.log(high / median) / NORMAL_95,
        config.rollout.max_response_tokens,
    )
    return Work(rates=rates, lengths=lengths, publish_s=mean(rows, "eopd_weights_seconds"))


def compare(label: str, config: Config, full: Work, rows: list[Row]) -> float:
    """A row of the table: a real run and its simulation, in seconds of a step and of its parts;
    returns simulated over real.
    """
    found: Simulation = simulate(
        config,
        full,
        counts=counts_of(config),
        batch=config.batch_trajectories,
        hardware=HARDWARE,
    )
    simulated = 3600.0 / found.steps_per_hour
    real = mean(rows, "eopd_step_seconds")
    parts = [
        f"{mean(rows, f'eopd_{part}_seconds'):.3f} / {found.learner[part] * simulated:.3f}"
        for part in PARTS
    ]
    ratio = simulated / real
    say(
        f"| {label} | {real:.3f} | {simulated:.3f} | {ratio:.3f} | "
        f"{' | '.join(parts)} | {mean(rows, 'eopd_staleness_mean'):.2f} / "
        f"{found.staleness_mean:.2f} |"
    )
    return ratio


def compare_runs(runs: list[Path]) -> bool:
    """The table; whether both runs are within the bar by their own rates."""
    configs = [load_config(run / "config.yaml", []) for run in runs]
    rows = [rows_of(run) for run in runs]
    works = [work_of(config, of) for config, of in zip(configs, rows, strict=True)]
    for config, work in zip(configs, works, strict=True):
        told = ",".join(f"{stage}={rate:.4g}" for stage, rate in work.rates.items())
        say(
            f"max_staleness {config.flow.max_staleness}: rates {told}, {work.lengths.mean:.1f} "
            f"tokens a response, sigma {work.lengths.sigma:.3f}, publish {work.publish_s:.3f} s"
        )

    heading = ("run", "real s", "simulated s", "ratio", *PARTS, "staleness")
    say("| " + " | ".join(heading) + " |\n" + "|---" * len(heading) + "|")
    alone = full_rates(configs[0], works[0], HARDWARE)
    ratios = [
        compare("max_staleness 0, its own rates", configs[0], alone, rows[0]),
        compare("max_staleness 1, its own rates", configs[1], works[1], rows[1]),
    ]
    compare("max_staleness 1, rates of the synchronous run", configs[1], alone, rows[1])
    met = all(abs(ratio - 1.0) <= BAR for ratio in ratios)
    say(f"\nboth runs within {BAR:.0%} by their own rates: {'pass' if met else 'MISS'}")
    return met


async def step_s(engine: Engine, flow: Flow, steps: int, speed: float) -> float:
    """Seconds of a step of the loop on paced fakes, by the clock of the loop that runs it."""
    clock = asyncio.get_running_loop().time
    line = paced_pipeline(engine, flow, steps, speed)
    number, started = 0, 0.0
    async for _ in line.steps(0):
        number += 1
        started = clock() if number == WARM_UP else started

    return (clock() - started) * speed / (steps - WARM_UP)


def compare_loops(steps: int, speed: float) -> None:
    heading = ("engine", "max_staleness", "lookahead", "in parts", "real s", "virtual s", "ratio")
    say("\n| " + " | ".join(heading) + " |\n" + "|---" * len(heading) + "|")
    took = 0.0
    for engine in ENGINES:
        for flow in FLOWS:
            real = asyncio.run(step_s(engine, flow, steps, speed))
            started = time.perf_counter()
            with asyncio.Runner(loop_factory=VirtualLoop) as runner:
                virtual = runner.run(step_s(engine, flow, steps, speed))

            took += time.perf_counter() - started
            say(
                f"| {engine.name} | {flow.max_staleness} | {flow.lookahead} | "
                f"{'yes' if flow.streams else 'no'} | {real:.3f} | {virtual:.3f} | "
                f"{virtual / real:.3f} |"
            )

    say(f"\nall of it in virtual time took {took:.1f} s")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", nargs=2, type=Path, help="of tiny models, with max_staleness 0 and 1"
    )
    parser.add_argument("--steps", type=int, default=30, help="of the loop on paced fakes")
    parser.add_argument("--speed", type=float, default=5.0, help="of the paced fakes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs = options.runs or [train(staleness, Path(directory)) for staleness in (0, 1)]
        met = compare_runs(runs)

    compare_loops(options.steps, options.speed)
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
