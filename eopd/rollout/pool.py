"""Several engines as one: each request goes to the engine with the fewest in flight."""

from collections.abc import Sequence

from eopd.roles import RolloutEngine
from eopd.types import LostTrajectory, PromptSample, Sampling, Stored, Trajectory


class EnginePool:
    """A ``RolloutEngine`` over several."""

    def __init__(self, engines: Sequence[RolloutEngine]) -> None:
        self._engines = engines
        self._in_flight = [0] * len(engines)

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Generate on the least loaded engine."""
        chosen = self._in_flight.index(min(self._in_flight))
        self._in_flight[chosen] += 1
        try:
            return await self._engines[chosen].generate(prompt, sample_index, sampling)
        finally:
            self._in_flight[chosen] -= 1
