"""Each teacher of a run is a ``Fleet`` of actors. They are tested once they have started, and a
trajectory is routed to them by the source of its prompt.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from eopd.config import Config, TeacherConfig
from eopd.fleet import Fleet
from eopd.hub import model_directory
from eopd.pool import NoAnswerError, Pool
from eopd.roles import TeacherDownError, TeacherScorer
from eopd.run.record import Row
from eopd.runtime.actors import MAX_CALLS, ActorProcess, RemoteTeacher, Spawn, TeacherActor
from eopd.runtime.placement import plan_teacher
from eopd.teacher.selftest import (
    CONTINUATION_TOKENS,
    SelfTestReport,
    TeacherSelfTestError,
    self_test,
)
from eopd.telemetry.series import series
from eopd.tokenizer import vocab_size
from eopd.types import (
    Int32Array,
    LostReason,
    LostTrajectory,
    ScoredTrajectory,
    Stored,
    Trajectory,
)


class TeacherRouter:
    """A ``TeacherScorer`` over the teachers of a run: each prompt's source has one.

    Args:
        fleets: the replicas of the teachers, by name.
        teacher_of: returns the teacher of a source.
    """

    def __init__(
        self,
        fleets: Mapping[str, Fleet[TeacherScorer]],
        teacher_of: Callable[[str], TeacherConfig | None],
    ) -> None:
        self.fleets = fleets
        self._teacher_of = teacher_of
        self._num_tokens = dict.fromkeys(fleets, 0)

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score on one replica of the teacher of the header's source; where that is lost, on another.

        Raises:
            KeyError: nobody teaches the source.
            RunFailedError: no replica is left.
        """
        header = stored.header
        teacher = self._teacher_of(header.source)
        if teacher is None:
            raise KeyError(f"no teacher for source {header.source!r}")

        pool = self.fleets[teacher.name].pool
        try:
            outcome = await pool.run(lambda scorer: scorer.score(stored), header.priority)
        except NoAnswerError as error:
            return LostTrajectory(
                key=header.key,
                reason=LostReason.TEACHER_FAILED,
                detail=str(error),
            )

        if isinstance(outcome, Stored):
            self._num_tokens[teacher.name] += outcome.header.num_response_tokens

        return outcome

    def metrics(self) -> Row:
        """Returns what the replicas of each teacher have done so far, and how many take requests and
        should.
        """
        row: dict[str, float] = {}
        for teacher, fleet in self.fleets.items():
            values = {
                "eopd_teacher_tokens_total": self._num_tokens[teacher],
                "eopd_teacher_failures_total": fleet.pool.num_failures,
                "eopd_teacher_replacements_total": fleet.num_replacements,
                "eopd_teacher_replicas_up": fleet.pool.num_up,
                "eopd_teacher_replicas_wanted": fleet.size,
                "eopd_teacher_in_flight_trajectories": sum(fleet.pool.in_flight.values()),
            }
            row |= {series(name, teacher=teacher): float(value) for name, value in values.items()}

        return row

    def status(self) -> list[str]:
        """Returns what each replica of each teacher does now, a line each, for people."""
        return [line for fleet in self.fleets.values() for line in fleet.pool.status()]


def teacher_fleets(
    spawn: Spawn, config: Config, count_loss: Callable[[str], None], log: Callable[[str], None]
) -> dict[str, Fleet[TeacherScorer]]:
    """Returns the fleet of every teacher's replicas, by the teacher's name; ``spawn`` makes their
    actors, and its owner ends them.
    """
    return {
        teacher.name: _fleet(spawn, config, teacher, count_loss, log) for teacher in config.teachers
    }


def _fleet(
    spawn: Spawn,
    config: Config,
    teacher: TeacherConfig,
    count_loss: Callable[[str], None],
    log: Callable[[str], None],
) -> Fleet[TeacherScorer]:
    plan = plan_teacher(teacher)
    longest = config.max_teacher_tokens(teacher)

    arguments = (teacher, config.loss.top_k, longest, config.flow.filter, config.student.model)

    def processes(numbers: Sequence[int]) -> list[ActorProcess[RemoteTeacher]]:
        actors = spawn(TeacherActor, plan, numbers, max_concurrency=MAX_CALLS)
        return [
            ActorProcess(actor, RemoteTeacher(actor), TeacherDownError, *arguments)
            for actor in actors
        ]

    return Fleet(
        Pool(
            f"teacher {teacher.name} replica",
            timeout_s=teacher.timeout_s,
            ping=lambda scorer: scorer.ping(),  # type: ignore[attr-defined]
        ),
        spawn=processes,
        size=plan.actors,
        count_loss=count_loss,
        start_timeout_s=config.cluster.start_timeout_s,
        log=log,
    )


async def self_test_replicas(
    config: Config, fleets: Mapping[str, Fleet[TeacherScorer]], prompt_ids: Int32Array
) -> list[SelfTestReport]:
    """Tests all replicas of all teachers, which must have started.

    Args:
        config: the config of the run.
        fleets: the replicas, by the teacher's name.
        prompt_ids: [P], any prompt of the run.

    Raises:
        TeacherSelfTestError: the answers of a replica are not possible, or the replicas differ.
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
                vocab_size=vocab_size(model_directory(teacher.model)),
                dtype=teacher.dtype,
                rounded_logits=teacher.logits_are_rounded,
            )
    except (TimeoutError, TeacherDownError) as error:
        reason = str(error) or f"no answer within timeout_s = {teacher.timeout_s:g}"
        raise TeacherSelfTestError(f"teacher {teacher.name}: {reason}") from error


class _WithBodies:
    """A ``TeacherScorer`` that fetches the bodies of its answers, for the few of the self-test."""

    def __init__(self, teacher: TeacherScorer) -> None:
        self._teacher = teacher

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        scored = await self._teacher.score(stored)
        if isinstance(scored, LostTrajectory):
            return scored

        return Stored(scored.header, await scored.body)  # type: ignore[misc]
