"""The rollout engines of a run as actors: started together, replaced one by one, more or fewer on request, and brought
to the learner's version before they get work.
"""

import asyncio
from collections.abc import Awaitable, Mapping

from ray.actor import ActorHandle
from ray.exceptions import RayError

from eopd.config import Config, RolloutConfig, StudentConfig
from eopd.config.loss import GraderName
from eopd.replicas import Replicas
from eopd.roles import EngineDownError, LearnerDownError, RolloutEngine
from eopd.runtime.actors import MAX_CONCURRENT_REQUESTS, RemoteEngine, RolloutActor, Spawn, end
from eopd.runtime.placement import plan_rollout
from eopd.runtime.restarts import RestartBudget
from eopd.types import Int32Array, PolicyVersion
from eopd.weights.channel import BroadcastChannel, SenderLink
from eopd.weights.probe import Probe

_JOIN_AGAIN_S = 1.0
_GRACE_S = 10.0  # the wire's own time-outs come first: they say what is wrong


class EngineFleet:
    """The engines of one run; ``spawn`` makes their actors and answers for their end."""

    channel: BroadcastChannel

    def __init__(self, spawn: Spawn, config: Config, restarts: RestartBudget) -> None:
        self._spawn = spawn
        self._config = config
        self._restarts = restarts
        self._plan = plan_rollout(config.rollout)
        actors = spawn(RolloutActor, self._plan, range(self._plan.actors), max_concurrency=MAX_CONCURRENT_REQUESTS)
        self._actors = dict(enumerate(actors))
        self._remotes = [RemoteEngine(actor) for actor in actors]
        self.replicas: Replicas[RolloutEngine] = Replicas(
            "rollout engine", self._remotes, replace=self._replace, timeout_s=config.rollout.timeout_s
        )

    def start(self) -> Mapping[str, Awaitable[None]]:
        """Start all engines; one awaitable for each, by name."""
        return {f"rollout engine {index}": self._start(actor) for index, actor in self._actors.items()}

    def connect(self, sender: SenderLink, text: Int32Array) -> BroadcastChannel:
        """The channel from ``sender`` to all engines, those to come included; ``text`` is what they are probed with."""
        config, weights = self._config, self._config.weights
        self.channel = BroadcastChannel(
            sender,
            dict(enumerate(self._remotes)),
            workers_per_engine=_workers(config.rollout),
            probe=Probe(
                token_ids=text[: config.max_sequence_tokens - 1],
                dtype=config.student.chosen_dtype,
                every=weights.verify_every,
            ),
            condemn=self.replicas.condemn,
            connect_timeout_s=weights.connect_timeout_s + _GRACE_S,
            timeout_s=weights.timeout_s + _GRACE_S,
        )
        return self.channel

    def _start(self, actor: ActorHandle) -> Awaitable[None]:
        config = self._config
        grader = config.loss.reward.grader if config.loss.reward else None
        return start_engine(actor, config.student, config.rollout, config.max_sequence_tokens, grader)

    @property
    def num_engines(self) -> int:
        """Those that run or are being replaced."""
        return len(self._actors)

    async def scale(self, num_engines: int) -> None:
        """Start more engines, or let some finish what they have and end, those first that take no work, then the last;
        the run goes on meanwhile.

        Raises:
            TimeoutError: a new one did not start within ``cluster.start_timeout_s``: the cluster may have no room.
            EngineDownError: it died; those that came up before it stay.
        """
        too_many = max(0, self.num_engines - num_engines)
        for index in sorted(self._actors, key=lambda index: (self.replicas.is_up(index), -index))[:too_many]:
            await self.replicas.drain(index)
            await self.channel.part(index)
            await end(self._actors.pop(index))
        while self.num_engines < num_engines:
            index = max(self._actors) + 1
            try:
                engine = await self._start_another(index)
            except BaseException:
                await end(self._actors.pop(index))
                raise
            self.replicas.add(index, engine)

    async def _replace(self, index: int, reason: str) -> RemoteEngine:
        """End an engine, and start another in its place."""
        self._restarts.spend(f"rollout engine {index}: {reason}")
        self.channel.leave(index)
        await end(self._actors[index])
        return await self._start_another(index)

    async def _start_another(self, index: int) -> RemoteEngine:
        """Start an engine and bring it to the learner's version."""
        (actor,) = self._spawn(RolloutActor, self._plan, [index], max_concurrency=MAX_CONCURRENT_REQUESTS)
        self._actors[index] = actor
        engine = RemoteEngine(actor)
        async with asyncio.timeout(self._config.cluster.start_timeout_s):
            try:
                await self._start(actor)
            except RayError as error:
                raise EngineDownError(f"it did not start: {error}") from error
            while True:
                try:
                    await self.channel.join(index, engine)
                    return engine
                except LearnerDownError:  # another one is being started
                    await asyncio.sleep(_JOIN_AGAIN_S)


def start_engine(
    actor: ActorHandle,
    student: StudentConfig,
    rollout: RolloutConfig,
    max_sequence_tokens: int,
    grader: GraderName | None,
) -> Awaitable[None]:
    """Start the engine of an actor, with the student as it was given."""
    version = PolicyVersion(0, 0)
    started: Awaitable[None] = actor.start.remote(student, rollout, max_sequence_tokens, version, grader)
    return started


def _workers(rollout: RolloutConfig) -> int:
    """VLLM workers of one rollout engine: each takes part in the weight transfer."""
    options = rollout.vllm
    return int(str(options.get("tensor_parallel_size", 1))) * int(str(options.get("pipeline_parallel_size", 1)))
