"""What the driver costs, and how well the stages overlap, on fakes: no model, no Ray.

**cost**: CPU time of the driver for a trajectory, all roles answering at once, but in a random
order and one in a turn of the loop, so that the driver wakes for each. In flight are 100 to 10,000
trajectories, once in two batches (``max_staleness`` 1), once in batches of 50 (``max_staleness`` up
to 199); and at 1,000, headers of 100 and of 100,000 tokens. The best of all rounds; rounds take
turns. Python's collector is on; what was imported is out of its sight.

**overlap**: every stage sleeps on a device of its own: writing a trajectory takes a lognormal time
(sigma 1, the same draws in every configuration), scoring 0.2 s, an update 0.8 s, weights 0.1 s, all
divided by ``--speed``. Full lanes write a batch in 1.0 s. There are two engines:

* ``lane each``: as many lanes as a batch has trajectories (8), 1.0 s each in the mean. Whoever
  needs a *whole* batch waits for the slowest of the 8, about 3 s, so the stage alone is one batch
  after another. Lanes that are always full are no measure: nothing whose staleness is at most 2
  keeps them so. While the slowest is written, two more batches may be, and then lanes run dry.
  Their share is printed without a bar.
* ``full lanes``: 2 lanes for a batch of 16, 1/8 s each in the mean. The stage alone is both lanes
always full.

The slowest stage alone is the slower of that and of the learner, which does update and weights one
after the other. The learner takes two trajectories at a time, one for each rank, while others are
still written; synchronous steps are measured without that too, and beside what the parts cannot
hide: the stage, scoring, the last part and the weights.

For every configuration a table explains the seconds of a step by the metrics of its row; the four
parts must add up to the wall clock between rows, which the bench takes itself.
"""

import argparse
import asyncio
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.prompts import PromptOrder
from eopd.run.progress import Progress
from eopd.run.record import Row
from eopd.telemetry.step import step_row
from eopd.types import (
    Header,
    LearnerStats,
    PackedBatch,
    PolicyVersion,
    PromptSample,
    PublishStats,
    Sampling,
    ScoredTrajectory,
    StopReason,
    Stored,
    Trajectory,
    TrajectoryKey,
)

IN_FLIGHT, SMALL_BATCH = (100, 1_000, 10_000), 50
LENGTHS = (100, 100_000)
RATE, GROWTH, SPEED_UP, OF_SLOWEST, UNEXPLAINED = 1_000.0, 1.5, 1.6, 0.9, 0.02  # the bars
STREAMED, OF_STAGE_AND_TAIL = 1.4, 1.1
WRITE_S, SCORE_S, TRAIN_S, WEIGHTS_S = 1.0, 0.2, 0.8, 0.1
PARTS = ("wait_rollout", "wait_teacher", "train", "weights")
WARM_UP = 3  # steps: the first find nothing in flight
MISS = "MISS"


class Roles:
    """Every role at once; answers without waiting, and knows which version is served."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.served = 0

    def write(self, prompt: PromptSample, sample_index: int, version: int) -> Stored[Trajectory]:
        header = Header(
            key=TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index),
            source=prompt.source,
            num_prompt_tokens=2,
            num_response_tokens=self.num_tokens - 2,
            num_loss_tokens=self.num_tokens - 2,
            stop_reason=StopReason.END_TOKEN,
            oldest_version=version,
            newest_version=version,
            sums={},
            response_crc32=0,
        )
        return Stored(header, None)

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory]:
        return Stored(stored.header, None)

    async def accumulate(self, part: PackedBatch) -> None:
        """A fake has nothing to add up."""

    async def step(self, batch: PackedBatch) -> LearnerStats:
        return LearnerStats(version=PolicyVersion(0, self.served + 1), metrics={})

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        self.served = version.step
        return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)


class OneByOne(Roles):
    """Holds everything that may be in flight, and answers in a random order, one in a turn of
    the loop.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.asked: list[asyncio.Future[None]] = []
        self.answering: asyncio.Task[None] | None = None
        self.random = random.Random(0)

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory]:
        version = self.served
        answer = asyncio.get_running_loop().create_future()
        self.asked.append(answer)
        if self.answering is None or self.answering.done():
            self.answering = asyncio.create_task(self.answer())

        await answer
        return self.write(prompt, sample_index, version)

    async def answer(self) -> None:
        while self.asked:
            asked, self.asked = self.asked, []
            self.random.shuffle(asked)
            for future in asked:
                future.set_result(None)
                await asyncio.sleep(0)


@dataclass(frozen=True)
class Engine:
    name: str
    batch: int
    lanes: int

    @property
    def write_s(self) -> float:
        """Of one trajectory, so that full lanes write a batch in WRITE_S."""
        return WRITE_S * self.lanes / self.batch


ENGINES = (Engine("lane each", 8, 8), Engine("full lanes", 16, 2))


@dataclass(frozen=True)
class Flow:
    max_staleness: int
    lookahead: int = 0
    streams: bool = True


BY_BATCH, IN_PARTS, STALE = Flow(0, streams=False), Flow(0), Flow(2)
FLOWS = (BY_BATCH, IN_PARTS, Flow(1), STALE, Flow(2, 1), Flow(4))
TAIL_S = SCORE_S + TRAIN_S / 8 + WEIGHTS_S  # of a synchronous step after its last response


class Paced(Roles):
    """Every stage on a device of its own."""

    def __init__(self, engine: Engine, speed: float) -> None:
        super().__init__(100)
        self.engine, self.speed = engine, speed
        self.lanes = asyncio.Semaphore(engine.lanes)

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory]:
        async with self.lanes:
            version = self.served
            seconds = self.engine.write_s * random.Random(sampling.seed).lognormvariate(-0.5, 1.0)
            await asyncio.sleep(seconds / self.speed)

        return self.write(prompt, sample_index, version)

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory]:
        await asyncio.sleep(SCORE_S / self.speed)
        return await super().score(stored)

    async def accumulate(self, part: PackedBatch) -> None:
        await asyncio.sleep(self.train_s(part) / self.speed)

    async def step(self, batch: PackedBatch) -> LearnerStats:
        await asyncio.sleep(self.train_s(batch) / self.speed)
        return await super().step(batch)

    def train_s(self, part: PackedBatch) -> float:
        return TRAIN_S * len(part.stored()) / self.engine.batch

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        await asyncio.sleep(WEIGHTS_S / self.speed)
        return await super().publish(version)


def prompt_order() -> PromptOrder:
    prompts = [
        PromptSample(
            epoch=0,
            prompt_id=str(i),
            source="bench",
            token_ids=np.zeros(2, np.int32),
            reference_answer=None,
        )
        for i in range(1_000)
    ]
    return PromptOrder(prompts, samples_per_prompt=4, seed=0)


def pipeline(
    roles: Roles,
    *,
    batch: int,
    batches: int,
    max_staleness: int,
    lookahead: int = 0,
    streams: bool = True,
    budget: int = 8,
) -> Pipeline:
    """A loop of two ranks, whose micro-batches hold ``budget`` trajectories."""
    plan = Plan(
        batch=batch,
        batches=batches,
        max_staleness=max_staleness,
        lookahead=lookahead,
        max_attempts=1,
        max_dropped=0,
        temperature=1.0,
        max_response_tokens=roles.num_tokens,
        ranks=2,
        optimizer_steps=1,
        token_budget=budget * roles.num_tokens,
        streams=streams,
        alpha_at=lambda batch: 1.0,
    )
    return Pipeline(
        plan,
        roles,
        roles,
        roles,
        roles,
        prompt_order(),
        Ledger(),
        Progress(),
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def verdict(what: str, value: float, bar: float, *, at_most: bool) -> str:
    met = value <= bar if at_most else value >= bar
    return (
        f"{what} {value:,.4g} (at {'most' if at_most else 'least'} {bar:,g}): "
        f"{'pass' if met else MISS}"
    )


@dataclass(frozen=True)
class Load:
    batch: int
    max_staleness: int
    num_tokens: int

    @property
    def in_flight(self) -> int:
        return self.batch * (1 + self.max_staleness)


def cost_s(load: Load, total: int) -> float:
    """CPU seconds of the driver for one trajectory."""

    async def drive() -> None:
        roles = OneByOne(load.num_tokens)
        batches = total // load.batch
        line = pipeline(
            roles,
            batch=load.batch,
            batches=batches,
            max_staleness=load.max_staleness,
        )
        async for _ in line.steps(0):
            pass

    started = time.process_time()
    asyncio.run(drive())

    return (time.process_time() - started) / total


def measure_cost(total: int, rounds: int) -> list[str]:
    """The table; the lines about rate and growth."""
    two = [Load(n // 2, 1, LENGTHS[0]) for n in IN_FLIGHT]
    many = [Load(SMALL_BATCH, n // SMALL_BATCH - 1, LENGTHS[0]) for n in IN_FLIGHT]
    lengths = [Load(500, 1, n) for n in LENGTHS]
    loads = list(dict.fromkeys([*two, *many, *lengths]))
    gc.freeze()  # else the cost of a full collection is that of the imported modules
    best = dict.fromkeys(loads, float("inf"))
    for _ in range(rounds):
        for load in loads:
            best[load] = min(best[load], cost_s(load, total))

    say(
        "| in flight | batch | max_staleness | tokens of a header | us a trajectory | "
        "trajectories/s |\n" + "|---" * 6 + "|"
    )

    for load, cost in best.items():
        cells = (
            load.in_flight,
            load.batch,
            load.max_staleness,
            load.num_tokens,
            1e6 * cost,
            1.0 / cost,
        )
        say("| " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")

    few, most = f"{IN_FLIGHT[0]:,}", f"{IN_FLIGHT[-1]:,}"
    growth = {
        f"{most} in flight beside {few}, two batches": two,
        f"{most} in flight beside {few}, batches of {SMALL_BATCH}": many,
        f"headers of {LENGTHS[1]:,} tokens beside {LENGTHS[0]:,}": lengths,
    }

    return [
        verdict("fewest trajectories/s", 1.0 / max(best.values()), RATE, at_most=False),
        *(
            verdict(f"{what}, cost", best[x[-1]] / best[x[0]], GROWTH, at_most=True)
            for what, x in growth.items()
        ),
    ]


def alone(engine: Engine, steps: int, speed: float, *, whole_batches: bool) -> float:
    """Steps/s of the engine by itself: batch after batch, or with every lane always full."""

    async def drive() -> float:
        roles, order = Paced(engine, speed), prompt_order()
        size = engine.batch if whole_batches else engine.batch * steps
        started = time.perf_counter()

        for first in range(0, engine.batch * steps, size):
            issues = range(first, first + size)
            sampling = {
                issue: order.sampling(
                    issue,
                    temperature=1.0,
                    max_tokens=100,
                )
                for issue in issues
            }
            await asyncio.gather(
                *(roles.generate(*order.at(i), how) for i, how in sampling.items())
            )

        return steps / (time.perf_counter() - started) / speed

    return asyncio.run(drive())


def paced_pipeline(engine: Engine, flow: Flow, steps: int, speed: float) -> Pipeline:
    """A loop on paced fakes, whose micro-batches hold one trajectory."""
    return pipeline(
        Paced(engine, speed),
        batch=engine.batch,
        batches=steps,
        max_staleness=flow.max_staleness,
        lookahead=flow.lookahead,
        streams=flow.streams,
        budget=1,
    )


def overlapped(engine: Engine, steps: int, speed: float, flow: Flow) -> tuple[list[Row], float]:
    """Rows after the warm-up, and the wall seconds they took."""

    async def drive() -> tuple[list[Row], float]:
        line = paced_pipeline(engine, flow, steps, speed)
        rows, started = [], 0.0
        async for done in line.steps(0):
            rows.append(step_row(done))
            started = time.perf_counter() if len(rows) == WARM_UP else started

        return rows[WARM_UP:], time.perf_counter() - started

    return asyncio.run(drive())


def show(
    engine: Engine, flow: Flow, rows: Sequence[Row], wall_s: float, speed: float
) -> tuple[float, float]:
    """A line of the table; steps/s, and the share of the wall clock that the four parts do
    not explain.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for row in rows:
        for name in PARTS:
            parts[name] += row[f"eopd_{name}_seconds"]

    unexplained = abs(1.0 - sum(parts.values()) / wall_s)
    step_s = wall_s * speed / len(rows)
    cells = [f"{seconds * speed / len(rows):.3f}" for seconds in parts.values()]
    staleness = sum(row["eopd_staleness_mean"] for row in rows) / len(rows)
    say(
        f"| {engine.name} | {flow.max_staleness} | {flow.lookahead} | "
        f"{'yes' if flow.streams else 'no'} | {1.0 / step_s:.3f} | {step_s:.3f} | "
        f"{' | '.join(cells)} | {unexplained:.2%} | {staleness:.2f} |"
    )

    return 1.0 / step_s, unexplained


def measure_overlap(steps: int, speed: float) -> list[str]:
    """The table; the lines about speed-up, the slowest stage, and what is not explained."""
    columns = (
        "engine",
        "max_staleness",
        "lookahead",
        "in parts",
        "steps/s",
        "step",
        *PARTS,
        "unexplained",
        "staleness",
    )
    say("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    lines, worst = [], 0.0

    for engine in ENGINES:
        rates = {}
        for flow in FLOWS:
            rates[flow], unexplained = show(
                engine,
                flow,
                *overlapped(engine, steps, speed, flow),
                speed,
            )
            worst = max(worst, unexplained)

        by_batch, full = (
            alone(engine, steps, speed, whole_batches=whole) for whole in (True, False)
        )
        learner = 1.0 / (TRAIN_S + WEIGHTS_S)
        slowest = min(by_batch if engine.lanes == engine.batch else full, learner)
        rate = rates[STALE]
        lines += [
            f"{engine.name}, alone, steps/s: batch after batch {by_batch:.3f}, lanes always "
            f"full {full:.3f}; the learner {learner:.3f}; at max_staleness 2, "
            f"{rate / min(full, learner):.2f} of full lanes",
            verdict(
                f"{engine.name}, max_staleness 2 beside 0 and whole batches, steps/s",
                rate / rates[BY_BATCH],
                SPEED_UP,
                at_most=False,
            ),
            verdict(
                f"{engine.name}, of the slowest stage alone",
                rate / slowest,
                OF_SLOWEST,
                at_most=False,
            ),
        ]

        streamed = rates[IN_PARTS]
        lines.append(
            verdict(
                f"{engine.name}, synchronous in parts, seconds a step beside the stage and its tail",
                1.0 / streamed / (1.0 / by_batch + TAIL_S),
                OF_STAGE_AND_TAIL,
                at_most=True,
            )
        )

    lines.append(
        verdict(
            f"{engine.name}, synchronous in parts beside whole batches, steps/s",
            streamed / rates[BY_BATCH],
            STREAMED,
            at_most=False,
        )
    )
    return [
        *lines,
        verdict(
            "share of a step that is not explained",
            worst,
            UNEXPLAINED,
            at_most=True,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a glance, on few trajectories; not the bars",
    )
    parser.add_argument(
        "--bars",
        nargs="+",
        default=["cost", "overlap"],
        choices=["cost", "overlap"],
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument(
        "--speed",
        type=float,
        default=10.0,
        help="how much faster than said the stages are",
    )
    options = parser.parse_args()
    lines = []
    if "cost" in options.bars:
        lines += measure_cost(20_000, 1 if options.quick else options.rounds)

    if "overlap" in options.bars:
        lines += measure_overlap(12 if options.quick else 60, options.speed)

    say("\n" + "\n".join(lines))
    if any(line.endswith(MISS) for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
