"""What an evaluation costs a run: the steps beside a benchmark, against the others of the same run.

First on paced fakes, whose learner shares nothing with the engines: there a step beside a benchmark
must take as long as another one while the learner is the slower part. Then on real parts, which
share the cores of this machine.

Engines write for both, so that a run may lose the time in which a benchmark's own tokens are
written, and no more. That time is what the benchmark takes after training, when nobody else asks
the engines. Held-out prompts, for which the learner waits, are measured between the steps, and are
not in them. The first steps, which warm everything up, are left out.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "system")]
import fakes  # noqa: E402
from program import Program, read_rows  # noqa: E402

from eopd.evaluation.beside import Beside, OneVersion  # noqa: E402
from eopd.models.tiny import write_tiny_pair  # noqa: E402
from eopd.pool import Pool  # noqa: E402
from eopd.types import Sampling  # noqa: E402

WARM_UP, STEPS = 4, 40
SEATS, LEARNER_S = 32, 0.1
PARTS = ("wait", "train", "weights")


def settings(options: argparse.Namespace) -> list[str]:
    """The run: a benchmark every few batches, engines and learner at work at the same time."""
    benchmark = (
        "{name: arithmetic, data: configs/prompts/arithmetic.jsonl, grader: math, "
        f"samples: {options.samples}, prompts: {options.prompts}, every: {options.every}}}"
    )
    return [
        f"run.batches={options.batches}",
        f"flow={{batch_prompts: 16, max_staleness: {options.staleness}}}",
        f"evaluation={{prompts: 8, max_response_tokens: 24, benchmarks: [{benchmark}]}}",
        "checkpoint.every=10000",
    ]


def show(name: str, rows: list[dict[str, float]]) -> float:
    """Prints what steps took, in the middle; returns it."""
    middle = {}
    for part in ("step", *PARTS):
        middle[part] = statistics.median(row[f"eopd_{part}_seconds"] for row in rows)

    waited = statistics.median(row["eopd_eval_wait_seconds"] for row in rows)
    parts = ", ".join(f"{part} {middle[part]:.2f}" for part in PARTS)
    sys.stdout.write(
        f"{name}: {len(rows)} steps of {middle['step']:.2f} s: {parts}, of which "
        f"{waited:.2f} for answers\n"
    )
    return middle["step"]


class Paced(fakes.World):
    """Engines of ``SEATS`` seats and a learner that take their time, and no core."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.pool: Pool[object] = Pool(
            "engine",
            timeout_s=60.0,
            ping=lambda engine: settled(),
        )

    async def generate(self, of, sample_index, sampling):
        async def write(engine: object) -> object:
            version = self.served
            await asyncio.sleep(self.random.lognormvariate(-4.0, 0.5))
            return self.write(of, sample_index, version)

        return await self.pool.run(write, sampling.priority)

    async def step(self, batch):
        await asyncio.sleep(LEARNER_S)
        return await super().step(batch)


async def settled() -> None:
    """Answers at once."""


async def paced(num_answers: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps beside a benchmark of so many answers, and of the others."""
    world, beside, others = Paced(), [], []
    world.pool.add(0, object(), SEATS)
    under_way = Beside()
    loop = fakes.pipeline(
        world,
        batch=16,
        batches=STEPS,
        max_staleness=2,
        token_budget=64,
    )
    loop.before_publish = under_way.written

    async def ask(engines: OneVersion) -> None:
        sampling = Sampling(temperature=1.0, max_tokens=4, seed=0, priority=-1)
        one = fakes.prompt()
        await asyncio.gather(
            *(
                engines.generate(
                    one,
                    i,
                    sampling,
                )
                for i in range(num_answers)
            )
        )

    async for done in loop.steps(0):
        step = done.stats.version.step
        (beside if step % 5 == 1 else others).append(done.seconds["step"])
        if step % 5 == 0:
            engines = OneVersion(world, step, num_answers)
            under_way.start(engines, ask(engines))

    await under_way.finish()
    return beside[1:], others[WARM_UP:]


def main() -> None:
    """The fakes, then one run, the two kinds of its steps, and the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--staleness", type=int, default=2)
    options = parser.parse_args()

    for num_answers in (16, 64, 256):
        beside, others = (statistics.mean(part) for part in asyncio.run(paced(num_answers)))
        sys.stdout.write(
            f"paced, {num_answers} answers: a step beside takes {beside / others:.2f} of another\n"
        )

    with tempfile.TemporaryDirectory() as temporary:
        program = Program(models=Path(temporary, "models"), runs=Path(temporary, "runs"))
        write_tiny_pair(program.models)
        done = program.run(*program.train("evaluated", *settings(options)))
        assert done.returncode == 0, done.stdout + done.stderr
        rows = read_rows(program.runs / "evaluated" / "metrics.jsonl")[WARM_UP:]
        measured = read_rows(program.runs / "evaluated" / "evaluations.jsonl")

    # the step that goes on beside a benchmark comes after the step whose weights it measures
    beside = show("beside", [row for row in rows if row["step"] % options.every == 1])
    others = show("others", [row for row in rows if row["step"] % options.every != 1])
    (alone,) = (
        one["seconds"] for one in measured if (one["name"], one["phase"]) == ("arithmetic", "after")
    )
    lost = max(0.0, beside - others)
    verdict = "ok" if lost <= alone else "MISS"
    sys.stdout.write(
        f"a step beside a benchmark takes {beside / others:.2f} of another one; {lost:.2f} s are "
        f"lost, at most the {alone:.2f} s that its answers take alone: {verdict}\n"
    )
    sys.stdout.write(json.dumps({"ratio": beside / others, "lost": lost, "alone": alone}) + "\n")
    sys.exit(lost > alone)


if __name__ == "__main__":
    main()
