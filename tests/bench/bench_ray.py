"""The run's own driver, pools, proxies and actors on real Ray, with nothing heavy inside: how many
trajectories a second go from engines through a teacher to the learner, and what stays.

    ThinRollout  ──▶  object store  ──▶  ThinTeacher  ──▶  object store  ──▶  ThinLearner
         ▲                    the driver: Pipeline, pools, ledger                  │
         └────────────────────────────────────────────────────────────────────────┘

Thin actors are the run's actors with vLLM and DeepSpeed taken out. An engine answers at once with
2,000 made-up tokens, the teacher adds a signal of the size of a real one, and the learner fetches
every body. All else is what a run has.

Memory is looked at after every batch; the median of the last third is compared with that of the
third before it, since the first third fills what is kept.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from eopd.config import Config, load_config
from eopd.fleet import Fleet
from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, Plan
from eopd.prompts import PromptOrder
from eopd.run.progress import Progress
from eopd.runtime.actors import RemoteEngine, RolloutActor, TeacherActor
from eopd.runtime.cluster import connect, memory_row
from eopd.runtime.engines import EnginePool, engine_fleet
from eopd.runtime.gang import LearnerGang
from eopd.runtime.learner_actor import LearnerActor
from eopd.runtime.placement import RoleResources
from eopd.runtime.teachers import TeacherRouter, teacher_fleets
from eopd.types import (
    Exact,
    Header,
    LearnerStats,
    PolicyVersion,
    PromptSample,
    PublishStats,
    Sampling,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

ROOT = Path(__file__).parents[2]
SEATS = 64
BARS = {"trajectories/s": 500.0, "driver, MiB": 30.0, "object stores, MiB": 30.0}


class MadeUpEngine:
    """Answers at once with as many tokens as it may."""

    def __init__(self) -> None:
        self._step = 0

    async def install_weights(self, version: PolicyVersion) -> float:
        self._step = version.step
        return 0.0

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory]:
        size = sampling.max_tokens
        body = Trajectory(
            prompt=prompt,
            sample_index=sample_index,
            response_ids=np.full(size, sampling.seed % 1_000, np.int32),
            loss_mask=np.ones(size, np.bool_),
            rollout_logprobs=np.zeros(size, np.float32),
            policy_versions=np.full(size, self._step, np.int32),
            stop_reason=StopReason.LENGTH,
        )
        return Stored(Header.of(body, {"generate_s": 0.0, "rollout_logprob": 0.0}), body)


class MadeUpScorer:
    """Answers at once with the signal of a sure teacher."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory]:
        size = stored.header.num_response_tokens
        signal = TeacherSignal(
            teacher="teacher",
            token_logprobs=np.zeros(size, np.float32),
            entropy=Exact(np.zeros(size, np.float32)),
            topk_ids=np.zeros((size, self._top_k), np.int32),
            topk_logprobs=np.zeros((size, self._top_k), np.float32),
            tail_logprobs=np.full(size, -np.inf, np.float32),
        )
        return Stored(stored.header, ScoredTrajectory(trajectory=stored.body, signal=signal))


class ThinRollout(RolloutActor):
    """A rollout actor without vLLM."""

    async def start(self, *arguments: object) -> int:
        self._engine = MadeUpEngine()
        self._verifier, self._keeps_row = None, False
        return SEATS


class ThinTeacher(TeacherActor):
    """A teacher's actor without vLLM."""

    async def start(self, teacher: object, top_k: int, *arguments: object) -> int:
        self._scorer, self._filter = MadeUpScorer(top_k), None
        return SEATS


class ThinLearner(LearnerActor):
    """A learner rank without DeepSpeed; ``take`` is the real one."""

    def start(self, *arguments: object) -> None:
        self._steps = 0

    def accumulate(self) -> None:
        """Nothing is added up."""

    def step(self) -> LearnerStats:
        assert all(
            stored.body.signal.topk_ids.shape[0] == stored.header.num_response_tokens
            for stored in self._share.stored()
        )
        self._steps += 1
        return LearnerStats(version=PolicyVersion(0, self._steps), metrics={})


class Labels:
    """A channel that tells engines the version, and sends no weights."""

    def __init__(self, fleet: Fleet[RemoteEngine]) -> None:
        self._fleet = fleet

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        engines = self._fleet.workers.values()
        await asyncio.gather(*(engine.install_weights(version) for engine in engines))
        return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)


THIN = {RolloutActor: ThinRollout, TeacherActor: ThinTeacher, LearnerActor: ThinLearner}


def spawn(
    actor: type, plan: RoleResources, numbers: Sequence[int], **options: int
) -> list[ActorHandle]:
    thin = ray.remote(THIN[actor]).options(num_cpus=0, **options)
    return [thin.remote(f"{plan.role}-{number}") for number in numbers]


def config_of(tokens: int, top_k: int, batch: int, batches: int) -> Config:
    """The tiny config, of which nothing is loaded."""
    settings = [
        f"run.batches={batches}",
        f"rollout.max_response_tokens={tokens}",
        f"loss.top_k={top_k}",
        f"flow={{batch_prompts: {batch}, max_staleness: 2}}",
        f"learner.token_budget={16 * (tokens + 200)}",
        "learner.ranks=1",
        "student.dtype=float32",
    ]
    return load_config(ROOT / "configs/tiny.yaml", settings)


@dataclass
class Seen:
    """What was seen after every batch."""

    clock: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    stores: list[float] = field(default_factory=list)

    def look(self) -> None:
        row = memory_row()
        self.clock.append(time.monotonic())
        self.driver.append(row["eopd_driver_memory_bytes"] / 2**20)
        self.stores.append(row["eopd_object_store_bytes"] / 2**20)


def growth(values: Sequence[float]) -> float:
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[third : 2 * third])


async def move(config: Config) -> Seen:
    """Move all trajectories of a run."""
    engines = engine_fleet(
        spawn,
        config.student,
        config.rollout,
        config.max_sequence_tokens,
        start_timeout_s=60.0,
        count_loss=fail,
        log=fail,
    )
    teachers = teacher_fleets(spawn, config, fail, fail)
    gang = LearnerGang(spawn, config)
    starting = [*engines.start().values()]
    starting += [start for fleet in teachers.values() for start in fleet.start().values()]
    await asyncio.gather(gang.start(0), *starting)

    prompts = [
        PromptSample(
            epoch=0,
            prompt_id=str(number),
            source="bench",
            token_ids=np.arange(64, dtype=np.int32),
            reference_answer=None,
        )
        for number in range(1_000)
    ]
    line = Pipeline(
        Plan.of(config),
        EnginePool(engines),
        TeacherRouter(teachers, config.teacher_of),
        gang,
        Labels(engines),
        PromptOrder(prompts, samples_per_prompt=1, seed=0),
        Ledger(),
        Progress(),
    )
    seen = Seen()
    async for _ in line.steps(0):
        seen.look()

    await engines.close()
    return seen


def fail(text: str) -> None:
    raise RuntimeError(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    batches = arguments.trajectories // arguments.batch
    config = config_of(arguments.tokens, arguments.top_k, arguments.batch, batches)
    with connect(config.cluster):
        seen = asyncio.run(move(config))

    first = len(seen.clock) // 10  # processes start, and caches fill
    seconds = seen.clock[-1] - seen.clock[first]
    rate = (len(seen.clock) - 1 - first) * arguments.batch / seconds
    found = {
        "trajectories/s": rate,
        "driver, MiB": growth(seen.driver),
        "object stores, MiB": growth(seen.stores),
    }
    say(
        f"{arguments.trajectories:,} trajectories of {arguments.tokens:,} tokens, K {arguments.top_k}"
    )
    say(f"driver {seen.driver[-1]:.0f} MiB, object stores at most {max(seen.stores):.0f} MiB")
    missed = []
    for name, value in found.items():
        fast = name == "trajectories/s"
        met = value >= BARS[name] if fast else value <= BARS[name]
        what = name if fast else f"{name}, the last third more than the one before"
        say(f"{what}: {value:.1f} (at {'least' if fast else 'most'} {BARS[name]:g})")
        if not met:
            missed.append(name)

    sys.exit(f"MISS: {', '.join(missed)}" if missed else 0)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
