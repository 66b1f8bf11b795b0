"""Several engines behind the interface of one: a ``RolloutEngine`` over a ``Pool``."""

from eopd.fleet import Fleet
from eopd.pool import NoAnswerError
from eopd.roles import RolloutEngine
from eopd.run.record import Row
from eopd.telemetry.series import series
from eopd.types import (
    LostReason,
    LostTrajectory,
    PromptSample,
    Sampling,
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
