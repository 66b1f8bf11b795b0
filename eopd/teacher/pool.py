"""Replicas of a teacher as one, and several teachers as one: who scores what.

TeacherPool    the replicas of one teacher (``eopd/replicas.py``), and another try where one fails
TeacherRouter  the teachers of a run, by the source of the prompt
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from eopd.replicas import ReplicaFailedError, Replicas
from eopd.roles import TeacherScorer
from eopd.telemetry.catalog import Row
from eopd.telemetry.rows import series
from eopd.types import LossReason, LostTrajectory, ScoredTrajectory, Stored, Trajectory

Outcome = Stored[ScoredTrajectory] | LostTrajectory


class TeacherPool:
    """A ``TeacherScorer`` over the replicas of one teacher.

    Args:
        name: of the teacher.
        replicas: scorers of the same model.
        replace: see ``Replicas``.
        timeout_s: an answer that takes longer is a failure of the replica.
        max_attempts: how often one trajectory is tried; not for ever, since it may be what kills.
    """

    def __init__(
        self,
        name: str,
        replicas: Sequence[TeacherScorer],
        *,
        replace: Callable[[int, str], Awaitable[TeacherScorer]],
        timeout_s: float,
        max_attempts: int,
    ) -> None:
        self._name = name
        self._replicas = Replicas(f"teacher {name}", replicas, replace=replace, timeout_s=timeout_s)
        self._max_attempts = max_attempts
        self._num_tokens = 0

    async def score(self, stored: Stored[Trajectory]) -> Outcome:
        """Score on the least loaded replica that takes work, again elsewhere when that fails.

        Returns:
            The scored trajectory, or a ``LostTrajectory`` with the last reason after ``max_attempts``.

        Raises:
            WorkerDownError: no replica is left, and none could be started.
        """
        detail, tried = "", list[int]()
        for _ in range(self._max_attempts):
            try:
                outcome = await self._replicas.attempt(lambda scorer: scorer.score(stored), tried)
            except ReplicaFailedError as error:
                detail = str(error)
                continue
            if isinstance(outcome, Stored):
                self._num_tokens += outcome.header.num_response_tokens
                return outcome
            detail = outcome.detail
        detail = f"teacher {self._name}, {self._max_attempts} attempts, last: {detail}"
        return LostTrajectory(key=stored.header.key, reason=LossReason.TEACHER_FAILED, detail=detail)

    def metrics(self) -> Row:
        """What the pool has done so far, and who takes work now."""
        values = {
            "eopd_teacher_tokens_total": self._num_tokens,
            "eopd_teacher_failures_total": self._replicas.num_failures,
            "eopd_teacher_replacements_total": self._replicas.num_replacements,
            "eopd_teacher_replicas_up": self._replicas.num_up,
            "eopd_teacher_in_flight_trajectories": sum(self._replicas.in_flight.values()),
        }
        return {series(name, teacher=self._name): float(value) for name, value in values.items()}

    def status(self) -> list[str]:
        """What each replica does now, for people."""
        return self._replicas.status()

    async def close(self) -> None:
        """Stop replacing."""
        await self._replicas.close()


class TeacherRouter:
    """A ``TeacherScorer`` over teachers: each prompt's source has one.

    Args:
        by_source: the pool that teaches a source.
        default: the pool of all other sources; None where every source has its own.
    """

    def __init__(self, by_source: Mapping[str, TeacherPool], default: TeacherPool | None) -> None:
        self._by_source, self._default = by_source, default

    async def score(self, stored: Stored[Trajectory]) -> Outcome:
        """Score by the teacher of the header's source.

        Raises:
            KeyError: nobody teaches it.
        """
        pool = self._by_source.get(stored.header.source, self._default)
        if pool is None:
            raise KeyError(f"no teacher for source {stored.header.source!r}")
        return await pool.score(stored)

    def metrics(self) -> Row:
        """Those of all teachers."""
        return {name: value for pool in self._pools() for name, value in pool.metrics().items()}

    def status(self) -> list[str]:
        """What each replica of each teacher does now, for people."""
        return [line for pool in self._pools() for line in pool.status()]

    async def close(self) -> None:
        """Stop replacing."""
        for pool in self._pools():
            await pool.close()

    def _pools(self) -> list[TeacherPool]:
        every = [*self._by_source.values(), *([] if self._default is None else [self._default])]
        return list(dict.fromkeys(every))
