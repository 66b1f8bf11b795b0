"""The rollout engines of a run: a ``Fleet`` of actors, whose newcomers are brought to the learner's
version before they get work, and which ``eopd scale`` makes larger or smaller.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Never

from ray.actor import ActorHandle

from eopd.config import Config, RolloutConfig, StudentConfig
from eopd.config.loss import GraderName
from eopd.fleet import Fleet
from eopd.pool import Pool
from eopd.roles import EngineDownError, LearnerDownError, RolloutEngine
from eopd.run.directory import RunDirectory
from eopd.run.progress import first_line
from eopd.runtime.actors import MAX_CALLS, RemoteEngine, RolloutActor, Spawn, dies_as, end
from eopd.runtime.placement import plan_rollout
from eopd.types import Int32Array, PolicyVersion
from eopd.weights.channel import BroadcastChannel
from eopd.weights.links import SenderLink
from eopd.weights.probe import Probe

POLL_S = 1.0  # between two looks at what `eopd scale` asks for
RETRY_S = 30.0  # after engines did not start
_JOIN_AGAIN_S = 1.0
_GRACE_S = 10.0  # the wire's own time-outs come first: they say what is wrong


class EngineBody:
    """The actor of one engine."""

    def __init__(
        self,
        actor: ActorHandle,
        student: StudentConfig,
        rollout: RolloutConfig,
        max_sequence_tokens: int,
        grader: GraderName | None = None,
    ) -> None:
        self.worker = RemoteEngine(actor)
        self._actor = actor
        self._arguments = (student, rollout, max_sequence_tokens, PolicyVersion(0, 0), grader)

    async def start(self) -> int:
        """Start the engine with the student as it was given; returns how many responses it
        writes at a time.
        """
        with dies_as(EngineDownError):
            return int(await self._actor.start.remote(*self._arguments))

    async def end(self) -> None:
        """Stop the engine's processes and the actor."""
        await end(self._actor)


def engine_fleet(
    spawn: Spawn, config: Config, spend: Callable[[str], None], say: Callable[[str], None]
) -> Fleet[RolloutEngine]:
    """The engines of a run; ``spawn`` makes their actors and answers for their end."""
    rollout = config.rollout
    plan = plan_rollout(rollout)
    grader = config.loss.reward.grader if config.loss.reward else None

    def bodies(numbers: Sequence[int]) -> list[EngineBody]:
        actors = spawn(RolloutActor, plan, numbers, max_concurrency=MAX_CALLS)
        return [
            EngineBody(actor, config.student, rollout, config.max_sequence_tokens, grader)
            for actor in actors
        ]

    return Fleet(
        "rollout engine",
        Pool("rollout engine", timeout_s=rollout.timeout_s, ping=lambda engine: engine.version()),  # type: ignore[attr-defined]
        spawn=bodies,
        size=plan.actors,
        spend=spend,
        start_timeout_s=config.cluster.start_timeout_s,
        say=say,
    )


def connect(
    fleet: Fleet[RolloutEngine], sender: SenderLink, config: Config, text: Int32Array
) -> BroadcastChannel:
    """The channel from ``sender`` to all engines, those to come included; ``text`` is what
    they are probed with.
    """
    weights = config.weights
    channel = BroadcastChannel(
        sender,
        fleet.workers,  # type: ignore[arg-type]
        workers_per_engine=_workers(config.rollout),
        probe=Probe(
            token_ids=text[: config.max_sequence_tokens - 1],
            dtype=config.student.chosen_dtype,
            every=weights.verify_every,
        ),
        lose=fleet.pool.lose,
        connect_timeout_s=weights.connect_timeout_s + _GRACE_S,
        timeout_s=weights.timeout_s + _GRACE_S,
    )

    async def join(number: int, engine: RolloutEngine) -> None:
        while True:
            try:
                return await channel.join(number, engine)  # type: ignore[arg-type]
            except LearnerDownError:  # another one is being started
                await asyncio.sleep(_JOIN_AGAIN_S)

    fleet.join, fleet.leave, fleet.part = join, channel.leave, channel.part

    return channel


async def scale_on_request(
    directory: RunDirectory, fleet: Fleet[RolloutEngine], tell: Callable[[str], None]
) -> Never:
    """Bring the run to as many engines as ``eopd scale`` asks for, again and again."""
    while True:
        await asyncio.sleep(POLL_S)
        wanted = directory.engines_asked_for()
        if wanted is None or wanted == fleet.size:
            continue

        tell(f"from {fleet.size} rollout engines to {wanted}")

        try:
            await fleet.scale(wanted)
        except Exception as error:  # noqa: BLE001 - whatever keeps a newcomer from starting ends no run
            tell(
                f"{fleet.size} rollout engines, no more: {first_line(error)}; trying again "
                f"in {RETRY_S:.0f} s"
            )
            await asyncio.sleep(RETRY_S)
        else:
            tell(f"{wanted} rollout engines")


def _workers(rollout: RolloutConfig) -> int:
    """VLLM workers of one rollout engine: each takes part in the weight transfer."""
    options = rollout.vllm
    return int(str(options.get("tensor_parallel_size", 1))) * int(
        str(options.get("pipeline_parallel_size", 1))
    )
