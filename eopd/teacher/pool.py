"""Replicas of a teacher as one, and several teachers as one: who scores what, and what happens when nobody answers.

    replica    one ``TeacherScorer``; a circuit breaker keeps work from it while it does not answer
    TeacherPool    the replicas of one teacher: least loaded first, deadlines, another try elsewhere, replacement
    TeacherRouter  the teachers of a run, by the source of the prompt

A replica is one of

    closed     takes work                              -> open after ``_BREAKER`` failures in a row
    open       takes none for a while                  -> half open
    half open  takes one request, on probation         -> closed when it is answered, replaced when it is not
    replaced   gone; another one is being started      -> closed

A ``TeacherDownError`` costs the replica at once. The trajectory is tried again, but not for ever: it may be what kills.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from eopd.roles import TeacherDownError, TeacherScorer
from eopd.telemetry.catalog import Row, series
from eopd.types import LossReason, LostTrajectory, ScoredTrajectory, Stored, Trajectory

Outcome = Stored[ScoredTrajectory] | LostTrajectory

_BREAKER = 3  # failures in a row that open it
_OPEN_S = 10.0  # and for how long
_POLL_S = 0.1  # how often a request without a replica looks again
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0, 60.0, 60.0)  # before each attempt to replace a replica


@dataclass(slots=True)
class _Replica:
    scorer: TeacherScorer
    in_flight: int = 0
    failures: int = 0  # in a row
    open_until: float = 0.0
    replaced: bool = False

    def takes_work(self, now: float) -> bool:
        if self.replaced:
            return False
        return self.failures < _BREAKER or (now >= self.open_until and self.in_flight == 0)


class TeacherPool:
    """A ``TeacherScorer`` over the replicas of one teacher.

    Args:
        name: of the teacher.
        replicas: scorers of the same model.
        replace: starts a new scorer in the place of replica ``i``, whose own is gone or of no use.
        timeout_s: an answer that takes longer is a failure of the replica.
        max_attempts: how often one trajectory is tried.
    """

    def __init__(
        self,
        name: str,
        replicas: Sequence[TeacherScorer],
        *,
        replace: Callable[[int], Awaitable[TeacherScorer]],
        timeout_s: float,
        max_attempts: int,
    ) -> None:
        self._name = name
        self._replicas = [_Replica(scorer) for scorer in replicas]
        self._replace = replace
        self._timeout_s, self._max_attempts = timeout_s, max_attempts
        self._replacing: set[asyncio.Task[None]] = set()
        self._ended: BaseException | None = None  # why a replica could not be replaced
        self._counts: Counter[str] = Counter()
        self._closed = False

    async def score(self, stored: Stored[Trajectory]) -> Outcome:
        """Score on the least loaded replica that takes work, again elsewhere when that fails.

        Returns:
            The scored trajectory, or a ``LostTrajectory`` with the last reason after ``max_attempts``.

        Raises:
            TeacherDownError: no replica is left, and none could be started.
        """
        detail, tried = "", list[_Replica]()
        for _ in range(self._max_attempts):
            replica = await self._least_loaded(tried)
            tried.append(replica)
            on_probation = replica.failures >= _BREAKER
            try:
                outcome = await self._score_on(replica, stored)
            except (TeacherDownError, TimeoutError) as error:
                detail = str(error) or f"no answer within {self._timeout_s:g} s"
                self._blame(replica, hopeless=on_probation or isinstance(error, TeacherDownError))
                continue
            replica.failures = 0
            if isinstance(outcome, Stored):
                self._counts["tokens"] += outcome.header.num_response_tokens
                return outcome
            detail = outcome.detail
        detail = f"teacher {self._name}, {self._max_attempts} attempts, last: {detail}"
        return LostTrajectory(key=stored.header.key, reason=LossReason.TEACHER_FAILED, detail=detail)

    def metrics(self) -> Row:
        """What the pool has done so far, and who takes work now."""
        up = sum(replica.takes_work(time.monotonic()) for replica in self._replicas)
        values = {
            "eopd_teacher_tokens_total": self._counts["tokens"],
            "eopd_teacher_failures_total": self._counts["failures"],
            "eopd_teacher_replacements_total": self._counts["replacements"],
            "eopd_teacher_replicas_up": up,
            "eopd_teacher_in_flight_trajectories": sum(replica.in_flight for replica in self._replicas),
        }
        return {series(name, teacher=self._name): float(value) for name, value in values.items()}

    async def close(self) -> None:
        """Stop replacing."""
        self._closed = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)

    async def _least_loaded(self, tried: Sequence[_Replica]) -> _Replica:
        while True:
            now = time.monotonic()
            if free := [replica for replica in self._replicas if replica.takes_work(now)]:
                return min(free, key=lambda replica: (any(replica is one for one in tried), replica.in_flight))
            if all(replica.replaced for replica in self._replicas) and not self._replacing:
                raise TeacherDownError(f"teacher {self._name}: no replica is left") from self._ended
            await asyncio.sleep(_POLL_S)

    async def _score_on(self, replica: _Replica, stored: Stored[Trajectory]) -> Outcome:
        replica.in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await replica.scorer.score(stored)
        finally:
            replica.in_flight -= 1

    def _blame(self, replica: _Replica, *, hopeless: bool) -> None:
        self._counts["failures"] += 1
        if replica.replaced:  # others were in flight on it too
            return
        replica.failures += 1
        replica.open_until = time.monotonic() + _OPEN_S
        if hopeless and not self._closed:
            replica.replaced = True
            task = asyncio.create_task(self._put_another_in_place_of(replica))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _put_another_in_place_of(self, replica: _Replica) -> None:
        index = self._replicas.index(replica)
        for pause in _PAUSES_S:
            await asyncio.sleep(pause)
            try:
                scorer = await self._replace(index)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting, it is tried again, then told
                self._ended = error
                continue
            self._replicas[index] = _Replica(scorer)
            self._counts["replacements"] += 1
            return


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

    async def close(self) -> None:
        """Stop replacing."""
        for pool in self._pools():
            await pool.close()

    def _pools(self) -> list[TeacherPool]:
        every = [*self._by_source.values(), *([] if self._default is None else [self._default])]
        return list(dict.fromkeys(every))
