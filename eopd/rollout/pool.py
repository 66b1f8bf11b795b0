"""Several engines as one: each request goes to the engine with the fewest in flight, and elsewhere when that dies."""

from eopd.replicas import ReplicaFailedError, Replicas
from eopd.roles import RolloutEngine
from eopd.telemetry.catalog import Row
from eopd.telemetry.rows import series
from eopd.types import LossReason, LostTrajectory, PromptSample, Sampling, Stored, Trajectory, TrajectoryKey


class EnginePool:
    """A ``RolloutEngine`` over several.

    A request whose engine died is written again, with the same seed, on another one; after ``max_attempts`` it is a
    ``LostTrajectory``, since it may be what kills.
    """

    def __init__(self, engines: Replicas[RolloutEngine], *, max_attempts: int) -> None:
        self._engines = engines
        self._max_attempts = max_attempts

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Generate on the least loaded engine.

        Raises:
            WorkerDownError: no engine is left, and none could be started.
        """
        detail, tried = "", list[int]()
        for _ in range(self._max_attempts):
            try:
                return await self._engines.attempt(
                    lambda engine: engine.generate(prompt, sample_index, sampling), tried
                )
            except ReplicaFailedError as error:
                detail = str(error)
        key = TrajectoryKey(prompt.epoch, prompt.prompt_id, sample_index)
        detail = f"{self._max_attempts} engines did not answer, last: {detail}"
        return LostTrajectory(key=key, reason=LossReason.ROLLOUT_FAILED, detail=detail)

    def status(self) -> list[str]:
        """What each engine does now, for people."""
        return self._engines.status()

    def metrics(self) -> Row:
        """What became of the engines so far, and what each writes now."""
        return {
            "eopd_engine_failures_total": float(self._engines.num_failures),
            "eopd_engine_replacements_total": float(self._engines.num_replacements),
            "eopd_engines_up": float(self._engines.num_up),
        } | {
            series("eopd_engine_in_flight_trajectories", engine=str(index)): float(count)
            for index, count in self._engines.in_flight.items()
        }
