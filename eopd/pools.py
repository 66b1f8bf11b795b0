"""Many workers behind the interface of one, over the ``Pool`` of a fleet.

EnginePool     the rollout engines of a run
TeacherPool    the replicas of one teacher
TeacherRouter  the teachers of a run, by the source of the prompt
"""

from collections.abc import Mapping

from eopd.fleet import Fleet
from eopd.pool import NoAnswerError
from eopd.roles import RolloutEngine, TeacherScorer
from eopd.run.record import Row
from eopd.telemetry.series import series
from eopd.types import (
    LostReason,
    LostTrajectory,
    PromptSample,
    Sampling,
    ScoredTrajectory,
    Stored,
    Trajectory,
    TrajectoryKey,
)


class EnginePool:
    """A ``RolloutEngine`` that passes each request to an engine of a fleet."""

    def __init__(self, fleet: Fleet[RolloutEngine]) -> None:
        self._fleet = fleet
        self._pool = fleet.pool

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Sample one response on an engine; where that is lost, again on another one.

        Raises:
            RunFailedError: no engine is left.
        """
        try:
            return await self._pool.run(
                lambda engine: engine.generate(prompt, sample_index, sampling), sampling.priority
            )
        except NoAnswerError as error:
            key = TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index)
            return LostTrajectory(
                key=key,
                reason=LostReason.ROLLOUT_FAILED,
                detail=str(error),
            )

    def status(self) -> list[str]:
        """Returns for people what each engine does now."""
        return self._pool.status()

    def metrics(self) -> Row:
        """Returns how many engines failed, were replaced, are up and should be, and what each has in
        flight.
        """
        row = {
            "eopd_engine_failures_total": float(self._pool.num_failures),
            "eopd_engine_replacements_total": float(self._fleet.num_replacements),
            "eopd_engines_up": float(self._pool.num_up),
            "eopd_engines_wanted": float(self._fleet.size),
        }
        for number, count in self._pool.in_flight.items():
            row[series("eopd_engine_in_flight_trajectories", engine=str(number))] = float(count)

        return row


class TeacherPool:
    """A ``TeacherScorer`` over the replicas of one teacher."""

    def __init__(self, name: str, fleet: Fleet[TeacherScorer]) -> None:
        self._name = name
        self._fleet = fleet
        self._pool = fleet.pool
        self._num_tokens = 0

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score on one replica; where that is lost, on another one.

        Raises:
            RunFailedError: no replica is left.
        """
        try:
            outcome = await self._pool.run(
                lambda scorer: scorer.score(stored), stored.header.priority
            )
        except NoAnswerError as error:
            return LostTrajectory(
                key=stored.header.key, reason=LostReason.TEACHER_FAILED, detail=str(error)
            )

        if isinstance(outcome, Stored):
            self._num_tokens += outcome.header.num_response_tokens

        return outcome

    def metrics(self) -> Row:
        """Returns what the replicas have done so far, and how many take requests and should."""
        values = {
            "eopd_teacher_tokens_total": self._num_tokens,
            "eopd_teacher_failures_total": self._pool.num_failures,
            "eopd_teacher_replacements_total": self._fleet.num_replacements,
            "eopd_teacher_replicas_up": self._pool.num_up,
            "eopd_teacher_replicas_wanted": self._fleet.size,
            "eopd_teacher_in_flight_trajectories": sum(self._pool.in_flight.values()),
        }
        return {series(name, teacher=self._name): float(value) for name, value in values.items()}

    def status(self) -> list[str]:
        """Returns what each replica does now, a line each, for people."""
        return self._pool.status()


class TeacherRouter:
    """A ``TeacherScorer`` over teachers: each prompt's source has one.

    Args:
        by_source: the pool that teaches a source.
        default: the pool of all other sources; None where every source has its own.
    """

    def __init__(self, by_source: Mapping[str, TeacherPool], default: TeacherPool | None) -> None:
        self._by_source = by_source
        self._default = default

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score by the teacher of the header's source.

        Raises:
            KeyError: nobody teaches it.
        """
        pool = self._by_source.get(stored.header.source, self._default)
        if pool is None:
            raise KeyError(f"no teacher for source {stored.header.source!r}")

        return await pool.score(stored)

    def metrics(self) -> Row:
        """The metrics of all teachers."""
        return {name: value for pool in self._pools() for name, value in pool.metrics().items()}

    def status(self) -> list[str]:
        """Returns what each replica of each teacher does now, a line each, for people."""
        return [line for pool in self._pools() for line in pool.status()]

    def _pools(self) -> list[TeacherPool]:
        pools = [*self._by_source.values()]
        if self._default is not None:
            pools.append(self._default)

        return list(dict.fromkeys(pools))
