"""The teachers of a run as actors: started together, replaced one by one, routed to by source."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence

from eopd.config import TeacherConfig
from eopd.roles import TeacherDownError
from eopd.runtime.actors import MAX_CONCURRENT_REQUESTS, RemoteTeacher, Spawn, TeacherActor, end
from eopd.runtime.placement import plan_teacher
from eopd.runtime.restarts import RestartBudget
from eopd.teacher.pool import TeacherPool, TeacherRouter
from eopd.teacher.selftest import CONTINUATION_TOKENS, SelfTestReport, TeacherSelfTestError, self_test
from eopd.teacher.vocabulary import vocab_size
from eopd.types import Int32Array, LostTrajectory, ScoredTrajectory, Stored, Trajectory


class TeacherFleet:
    """The replicas of one teacher; ``spawn`` makes their actors and answers for their end."""

    def __init__(
        self,
        spawn: Spawn,
        config: TeacherConfig,
        restarts: RestartBudget,
        *,
        top_k: int,
        max_sequence_tokens: int,
        start_timeout_s: float,
    ) -> None:
        self.config = config
        self._spawn = spawn
        self._restarts = restarts
        self._plan = plan_teacher(config)
        self._start_timeout_s = start_timeout_s
        self._arguments = (config, top_k, max_sequence_tokens)
        self._actors = spawn(
            TeacherActor, self._plan, range(self._plan.actors), max_concurrency=MAX_CONCURRENT_REQUESTS
        )

    def start(self) -> Mapping[str, Awaitable[None]]:
        """Start all replicas; one awaitable for each, by name."""
        return {
            f"replica {index} of teacher {self.config.name}": actor.start.remote(*self._arguments)
            for index, actor in enumerate(self._actors)
        }

    def pool(self, *, max_attempts: int) -> TeacherPool:
        """The replicas as one scorer."""
        return TeacherPool(
            self.config.name,
            [RemoteTeacher(actor) for actor in self._actors],
            replace=self._replace,
            timeout_s=self.config.timeout_s,
            max_attempts=max_attempts,
        )

    async def self_test(self, prompt_ids: Int32Array) -> SelfTestReport:
        """Test all replicas, which must have started.

        Args:
            prompt_ids: [P], any prompt of the run.

        Raises:
            TeacherSelfTestError: one of them does not say what a teacher can say, or they differ.
        """
        longest = self._arguments[2] - CONTINUATION_TOKENS - 1
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await self_test(
                    [_WithBodies(RemoteTeacher(actor)) for actor in self._actors],
                    prompt_ids=prompt_ids[: max(1, longest)],
                    vocab_size=vocab_size(self.config.model),
                    dtype=self.config.dtype,
                    rounded_logits=self.config.logits_are_rounded,
                )
        except (TimeoutError, TeacherDownError) as error:
            reason = str(error) or f"no answer within timeout_s = {self.config.timeout_s:g}"
            raise TeacherSelfTestError(f"teacher {self.config.name}: {reason}") from error

    async def _replace(self, index: int, reason: str) -> RemoteTeacher:
        """End a replica, and start another in its place."""
        self._restarts.spend(f"teacher {self.config.name}, replica {index}: {reason}")
        await end(self._actors[index])
        (actor,) = self._spawn(TeacherActor, self._plan, [index], max_concurrency=MAX_CONCURRENT_REQUESTS)
        self._actors[index] = actor
        async with asyncio.timeout(self._start_timeout_s):
            await actor.start.remote(*self._arguments)
        return RemoteTeacher(actor)


class _WithBodies:
    """A ``TeacherScorer`` whose answers have the body itself, fetched: for the self-test's few short ones."""

    def __init__(self, teacher: RemoteTeacher) -> None:
        self._teacher = teacher

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        scored = await self._teacher.score(stored)
        return scored if isinstance(scored, LostTrajectory) else Stored(scored.header, await scored.body)  # type: ignore[misc]


def route(fleets: Sequence[TeacherFleet], *, max_attempts: int) -> TeacherRouter:
    """One scorer for all sources."""
    pools = [(fleet.config.sources, fleet.pool(max_attempts=max_attempts)) for fleet in fleets]
    by_source = {source: pool for sources, pool in pools for source in sources}
    return TeacherRouter(by_source, next((pool for sources, pool in pools if not sources), None))
