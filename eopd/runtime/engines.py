"""The rollout engines of a run are a ``Fleet`` of actors, behind the interface of one. A newcomer gets
the learner's weights before its first request; ``eopd scale`` changes the number of engines.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Never

from eopd.config import Config, RolloutConfig, StudentConfig
from eopd.config.loss import Reward
from eopd.fleet import Fleet
from eopd.pool import NoAnswerError, Pool
from eopd.roles import EngineDownError, LearnerDownError, RolloutEngine, SenderLink
from eopd.run.directory import RunDirectory
from eopd.run.progress import first_line
from eopd.run.record import Row
from eopd.runtime.actors import MAX_CALLS, ActorProcess, RemoteEngine, RolloutActor, Spawn
from eopd.runtime.placement import plan_rollout
from eopd.telemetry.series import series
from eopd.types import (
    Int32Array,
    LostReason,
    LostTrajectory,
    PromptSample,
    Sampling,
    Stored,
    Trajectory,
    TrajectoryKey,
)
from eopd.weights.channel import BroadcastChannel
from eopd.weights.probe import Probe

POLL_S = 1.0  # between two looks at what `eopd scale` asks for
RETRY_S = 30.0  # after engines did not start
_JOIN_AGAIN_S = 1.0
_GRACE_S = 10.0  # the wire's own time-outs come first: they tell what is wrong


class EnginePool:
    """A ``RolloutEngine`` that passes each request to an engine of ``fleet``."""

    def __init__(self, fleet: Fleet[RolloutEngine]) -> None:
        self.fleet = fleet

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Sample one response on an engine; where that is lost, again on another one.

        Raises:
            RunFailedError: no engine is left.
        """
        try:
            return await self.fleet.pool.run(
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
        return self.fleet.pool.status()

    def metrics(self) -> Row:
        """Returns how many engines failed, were replaced, are up and should be, and what each has in
        flight.
        """
        row = {
            "eopd_engine_failures_total": float(self.fleet.pool.num_failures),
            "eopd_engine_replacements_total": float(self.fleet.num_replacements),
            "eopd_engines_up": float(self.fleet.pool.num_up),
            "eopd_engines_wanted": float(self.fleet.size),
        }
        in_flight = self.fleet.pool.in_flight
        for number in sorted({*self.fleet.workers, *in_flight}):  # also those that will end
            key = series("eopd_engine_in_flight_trajectories", engine=str(number))
            row[key] = float(in_flight.get(number, 0))

        return row


def engine_fleet(
    spawn: Spawn,
    student: StudentConfig,
    rollout: RolloutConfig,
    max_sequence_tokens: int,
    *,
    reward: Reward | None = None,
    row_is_read_later: bool = False,
    start_timeout_s: float,
    count_loss: Callable[[str], None],
    log: Callable[[str], None],
) -> Fleet[RolloutEngine]:
    """Returns a fleet of engines, which start with the weights of ``student.model``; ``spawn`` makes
    their actors, and its owner ends them.
    """
    plan = plan_rollout(rollout)
    arguments = (student, rollout, max_sequence_tokens, reward, row_is_read_later)

    def processes(numbers: Sequence[int]) -> list[ActorProcess[RemoteEngine]]:
        actors = spawn(RolloutActor, plan, numbers, max_concurrency=MAX_CALLS)
        return [
            ActorProcess(actor, RemoteEngine(actor), EngineDownError, *arguments)
            for actor in actors
        ]

    return Fleet(
        Pool(
            "rollout engine",
            timeout_s=rollout.timeout_s,
            ping=lambda engine: engine.version(),  # type: ignore[attr-defined]
        ),
        spawn=processes,
        size=plan.actors,
        count_loss=count_loss,
        start_timeout_s=start_timeout_s,
        log=log,
    )


def open_channel(
    fleet: Fleet[RolloutEngine], sender: SenderLink, config: Config, text: Int32Array
) -> BroadcastChannel:
    """Opens the channel from ``sender`` to all engines of a fleet, also to newcomers.

    Args:
        fleet: the engines.
        sender: the learner.
        config: the run's.
        text: int32[N], tokens by which engines are compared with the learner.
    """
    weights = config.weights
    channel = BroadcastChannel(
        sender,
        fleet.workers,  # type: ignore[arg-type]
        probe=Probe(
            token_ids=text[: config.max_sequence_tokens - 1],
            dtype=config.student.chosen_dtype,
            every=weights.verify_every,
        ),
        lose=fleet.pool.lose,
        connect_timeout_s=weights.connect_timeout_s + _GRACE_S,
        timeout_s=weights.timeout_s + _GRACE_S,
    )

    async def join(number: int, engine: RolloutEngine) -> None:
        while True:
            try:
                return await channel.join(number, engine)  # type: ignore[arg-type]
            except LearnerDownError:  # another learner is being started
                await asyncio.sleep(_JOIN_AGAIN_S)

    fleet.join, fleet.after_loss, fleet.after_drain = join, channel.drop, channel.remove

    return channel


async def scale_on_request(
    directory: RunDirectory, fleet: Fleet[RolloutEngine], log: Callable[[str], None]
) -> Never:
    """Scales the fleet to the number of engines that ``eopd scale`` asks for, again and again."""
    while True:
        await asyncio.sleep(POLL_S)
        size = directory.engines_asked_for()
        if size is None or size == fleet.size:
            continue

        log(f"from {fleet.size} rollout engines to {size}")

        try:
            await fleet.scale(size)
        except Exception as error:  # noqa: BLE001 - whatever keeps a newcomer from starting ends no run
            log(
                f"{fleet.size} rollout engines, no more: {first_line(error)}; trying again "
                f"in {RETRY_S:.0f} s"
            )
            await asyncio.sleep(RETRY_S)
        else:
            log(f"{size} rollout engines")
