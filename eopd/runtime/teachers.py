"""The teachers of a run: a ``Fleet`` of actors each, tested when they have started, routed to
by source.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from ray.actor import ActorHandle

from eopd.config import Config, TeacherConfig
from eopd.fleet import Fleet
from eopd.pool import Pool
from eopd.roles import TeacherDownError, TeacherScorer
from eopd.runtime.actors import MAX_CALLS, RemoteTeacher, Spawn, TeacherActor, dies_as, end
from eopd.runtime.placement import plan_teacher
from eopd.teacher.pool import TeacherPool, TeacherRouter
from eopd.teacher.selftest import (
    CONTINUATION_TOKENS,
    SelfTestReport,
    TeacherSelfTestError,
    self_test,
)
from eopd.tokenizer import vocab_size
from eopd.types import Int32Array, LostTrajectory, ScoredTrajectory, Stored, Trajectory


class TeacherBody:
    """The actor of one replica; of a served teacher it holds a client."""

    def __init__(
        self, actor: ActorHandle, config: TeacherConfig, *, top_k: int, max_sequence_tokens: int
    ) -> None:
        self.worker = RemoteTeacher(actor)
        self._actor = actor
        self._arguments = (config, top_k, max_sequence_tokens)

    async def start(self) -> int:
        """Start the replica; returns how many trajectories it scores at a time."""
        with dies_as(TeacherDownError):
            return int(await self._actor.start.remote(*self._arguments))

    async def end(self) -> None:
        """Stop the replica's processes and the actor."""
        await end(self._actor)


def teacher_fleets(
    spawn: Spawn, config: Config, spend: Callable[[str], None], say: Callable[[str], None]
) -> dict[str, Fleet[TeacherScorer]]:
    """The replicas of every teacher, by its name; ``spawn`` makes their actors and answers
    for their end.
    """
    return {teacher.name: _fleet(spawn, config, teacher, spend, say) for teacher in config.teachers}


def _fleet(
    spawn: Spawn,
    config: Config,
    teacher: TeacherConfig,
    spend: Callable[[str], None],
    say: Callable[[str], None],
) -> Fleet[TeacherScorer]:
    plan = plan_teacher(teacher)
    name = f"teacher {teacher.name} replica"
    longest = config.max_teacher_tokens(teacher)

    def bodies(numbers: Sequence[int]) -> list[TeacherBody]:
        actors = spawn(TeacherActor, plan, numbers, max_concurrency=MAX_CALLS)
        return [
            TeacherBody(actor, teacher, top_k=config.loss.top_k, max_sequence_tokens=longest)
            for actor in actors
        ]

    return Fleet(
        name,
        Pool(name, timeout_s=teacher.timeout_s, ping=lambda scorer: scorer.ping()),  # type: ignore[attr-defined]
        spawn=bodies,
        size=plan.actors,
        spend=spend,
        start_timeout_s=config.cluster.start_timeout_s,
        say=say,
    )


def route(config: Config, fleets: Mapping[str, Fleet[TeacherScorer]]) -> TeacherRouter:
    """One scorer for all sources."""
    by_source, default = {}, None
    for teacher in config.teachers:
        pool = TeacherPool(teacher.name, fleets[teacher.name])
        by_source.update(dict.fromkeys(teacher.sources, pool))
        if not teacher.sources:
            default = pool

    return TeacherRouter(by_source, default)


async def self_test_replicas(
    config: Config, fleets: Mapping[str, Fleet[TeacherScorer]], prompt_ids: Int32Array
) -> list[SelfTestReport]:
    """Test all replicas of all teachers, which must have started.

    Args:
        config: the run's.
        fleets: the replicas, by the teacher's name.
        prompt_ids: [P], any prompt of the run.

    Raises:
        TeacherSelfTestError: one of them does not say what a teacher can say, or they differ.
    """
    return [
        await _test(config, teacher, fleets[teacher.name], prompt_ids)
        for teacher in config.teachers
    ]


async def _test(
    config: Config, teacher: TeacherConfig, fleet: Fleet[TeacherScorer], prompt_ids: Int32Array
) -> SelfTestReport:
    longest = config.max_teacher_tokens(teacher) - CONTINUATION_TOKENS - 1
    try:
        async with asyncio.timeout(teacher.timeout_s):
            return await self_test(
                [_WithBodies(scorer) for scorer in fleet.workers.values()],
                prompt_ids=prompt_ids[: max(1, longest)],
                vocab_size=vocab_size(teacher.model),
                dtype=teacher.dtype,
                rounded_logits=teacher.logits_are_rounded,
            )
    except (TimeoutError, TeacherDownError) as error:
        reason = str(error) or f"no answer within timeout_s = {teacher.timeout_s:g}"
        raise TeacherSelfTestError(f"teacher {teacher.name}: {reason}") from error


class _WithBodies:
    """A ``TeacherScorer`` whose answers have the body itself, fetched: for the self-test's
    few short ones.
    """

    def __init__(self, teacher: TeacherScorer) -> None:
        self._teacher = teacher

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        scored = await self._teacher.score(stored)
        if isinstance(scored, LostTrajectory):
            return scored

        return Stored(scored.header, await scored.body)  # type: ignore[misc]
