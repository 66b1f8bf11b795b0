"""Brings the actors of a run up and down. Whatever happens, nothing is left running."""

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayTaskError

from eopd.config import ClusterConfig, Config, ConfigError, RolloutConfig, StudentConfig
from eopd.fleet import Fleet, one_by_one
from eopd.roles import TeacherScorer
from eopd.run.directory import RunDirectory
from eopd.run.lock import Holder
from eopd.run.progress import first_line
from eopd.runtime.actors import Spawn, end_actor
from eopd.runtime.cluster import find_places, has_room, log_directory, place_on
from eopd.runtime.engines import EnginePool, engine_fleet, open_channel
from eopd.runtime.gang import LearnerGang
from eopd.runtime.logs import logger
from eopd.runtime.placement import (
    Places,
    RoleResources,
    plan,
    plan_learner,
    shares_gpus,
)
from eopd.runtime.restarts import RestartBudget
from eopd.runtime.teachers import TeacherRouter, teacher_fleets
from eopd.types import LostReason, LostTrajectory, PromptSample, RunFailedError, Stored
from eopd.weights.channel import BroadcastChannel
from eopd.weights.probe import probe_text

T = TypeVar("T")

FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Everything of a run that lives in actors: the roles of the loop. Engines and teacher know the
    fleets behind them.
    """

    engines: EnginePool
    teacher: TeacherRouter
    learner: LearnerGang
    channel: BroadcastChannel
    restarts: RestartBudget


@asynccontextmanager
async def start_workers(
    config: Config,
    incarnation: int,
    prompts: Sequence[PromptSample],
    say: Callable[[str], None],
    *,
    driver: Holder | None = None,
    logs: str | None = None,
) -> AsyncIterator[Workers]:
    """Starts every actor of a training run; engines are probed with the first of ``prompts``, and learner
    ranks look for the run directory of ``driver``, if they are to write there.

    All start at the same time, unless GPUs are shared: a vLLM engine measures how much memory is
    free while it starts, and nobody else may take or free some meanwhile (vLLM 0.32.0,
    ``gpu_worker.py``).
    """
    restarts = RestartBudget(config.cluster.max_restarts, config.cluster.restart_window_s)
    async with _actors(find_places(plan(config), spread=config.cluster.spread)) as spawn:
        gang = LearnerGang(spawn, config, driver)
        engines = engine_fleet(
            spawn,
            config.student,
            config.rollout,
            config.max_sequence_tokens,
            reward=config.loss.reward,
            row_is_read_later=config.flow.filter is not None,
            start_timeout_s=config.cluster.start_timeout_s,
            count_loss=restarts.count_loss,
            log=say,
        )
        teachers = teacher_fleets(spawn, config, restarts.count_loss, say)
        fleets: list[Fleet[Any]] = [engines, *teachers.values()]
        restarts.num_workers = lambda: 1 + sum(fleet.size for fleet in fleets)
        ranks = plan_learner(config.learner)
        gang.give_way = lambda number: _room_for(replace(ranks, actors=number), fleets)

        starting: dict[str, Awaitable[None]] = {"learner": gang.start(incarnation)}
        for fleet in fleets:
            starting |= fleet.start()

        await _all_up(
            starting,
            config.cluster.start_timeout_s,
            in_turn=shares_gpus(config),
            logs=logs or str(RunDirectory(config.run.path).logs),
        )

        try:
            yield Workers(
                engines=EnginePool(engines),
                teacher=TeacherRouter(teachers, config.teacher_of),
                learner=gang,
                channel=open_channel(engines, gang, config, probe_text(prompts)),
                restarts=restarts,
            )
        finally:
            await asyncio.gather(*(fleet.close() for fleet in fleets))


@contextmanager
def _room_for(ranks: RoleResources, fleets: Iterable[Fleet[Any]]) -> Iterator[None]:
    """Leaves the room of whoever is still starting to learner ranks, where there is no other. A run
    goes on without one of its engines, and never without a rank.
    """
    with ExitStack() as stack:
        if not has_room(ranks):
            for fleet in fleets:
                stack.enter_context(fleet.give_way())

        yield


@asynccontextmanager
async def rollout_engines(
    student: StudentConfig,
    rollout: RolloutConfig,
    max_sequence_tokens: int,
    cluster: ClusterConfig,
    say: Callable[[str], None],
) -> AsyncIterator[EnginePool]:
    """Rollout engines alone, for a benchmark. Those that are lost are replaced, as in a run."""
    restarts = RestartBudget(cluster.max_restarts, cluster.restart_window_s)
    async with _actors() as spawn:
        fleet = engine_fleet(
            spawn,
            student,
            rollout,
            max_sequence_tokens,
            start_timeout_s=cluster.start_timeout_s,
            count_loss=restarts.count_loss,
            log=say,
        )
        restarts.num_workers = lambda: fleet.size
        await _all_up(
            fleet.start(),
            cluster.start_timeout_s,
            in_turn=0 < rollout.gpus < 1,
            logs=log_directory(),
        )
        try:
            yield EnginePool(fleet)
        except RunFailedError as error:
            raise RunFailedError(f"{error}; logs in {log_directory()}") from error
        finally:
            await fleet.close()


@asynccontextmanager
async def teachers(config: Config) -> AsyncIterator[Mapping[str, Fleet[TeacherScorer]]]:
    """The teachers of a run alone, for a check."""
    async with _actors() as spawn:
        fleets = teacher_fleets(
            spawn,
            config,
            RestartBudget(0, 0.0).count_loss,
            lambda text: None,
        )
        starting = {
            name: started for fleet in fleets.values() for name, started in fleet.start().items()
        }
        await _all_up(
            starting,
            config.cluster.start_timeout_s,
            in_turn=shares_gpus(config),
            logs=log_directory(),
        )
        yield fleets


class StartError(RunFailedError):
    """An actor did not come up: which, why, and where its log is."""


async def _all_up(
    starting: Mapping[str, Awaitable[object]], timeout_s: float, *, in_turn: bool, logs: str
) -> None:
    """Wait until everybody has started; where they start ``in_turn``, ``timeout_s`` is for each.

    Raises:
        ConfigError: somebody found the user's mistake.
        StartError: somebody failed, or did not come up in time; the driver's log has the worker's
            traceback.
    """
    if in_turn:
        starting = one_by_one(starting)

    tasks = {asyncio.ensure_future(started): name for name, started in starting.items()}
    until = asyncio.FIRST_COMPLETED if in_turn else asyncio.FIRST_EXCEPTION
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=until)
            for task in done:
                _require_started(tasks[task], task.exception(), logs)

            if pending and not (in_turn and done):
                names = ", ".join(tasks[task] for task in pending)
                limit = f"cluster.start_timeout_s = {timeout_s:g}"
                raise StartError(f"not up within {limit}: {names}; logs in {logs}")
    finally:
        for task in tasks:
            task.cancel()

        # the first failure is the one that is told
        await asyncio.gather(*tasks, return_exceptions=True)


def _require_started(name: str, error: BaseException | None, logs: str) -> None:
    # what only the worker could find out
    if isinstance(error, ConfigError) and isinstance(error, RayTaskError):
        raise ConfigError(f"{name}: {error.cause}") from None  # type: ignore[attr-defined]

    if error is not None:
        logger.error("the %s did not start", name, exc_info=error)
        # Ray's error carries the worker's traceback
        cause = getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise StartError(f"the {name} did not start: {reason}; logs in {logs}")


@asynccontextmanager
async def _actors(places: Places | None = None) -> AsyncIterator[Spawn]:
    """A function that spawns actors; on the way out all of them are closed and killed, whatever
    happened. The first one of a role and number starts on its node in ``places``, those that replace
    it wherever there is room.

    Where some did not come up, or nobody waits any more, they are killed at once: what still starts
    does not listen.
    """
    spawned: list[ActorHandle] = []

    def spawn(
        role: type, resources: RoleResources, numbers: Iterable[int], **options: object
    ) -> list[ActorHandle]:
        def make(number: int) -> ActorHandle:
            node = places.pop((resources.role, number), None) if places else None
            remote = ray.remote(role).options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                runtime_env={"env_vars": dict(resources.env)},
                scheduling_strategy=place_on(node),
                label_selector=dict(resources.labels),
                **options,
            )
            return remote.remote(f"{resources.role.replace(' ', '-')}-{number}")

        actors = [make(number) for number in numbers]
        spawned.extend(actors)

        return actors

    try:
        yield spawn
    except (StartError, ConfigError, asyncio.CancelledError):
        for actor in spawned:
            ray.kill(actor)

        raise
    finally:
        try:
            await asyncio.gather(*(end_actor(actor) for actor in spawned))
        finally:  # also when a second signal cancels the closing
            for actor in spawned:
                ray.kill(actor)


async def fetch(stored: Stored[T]) -> T | LostTrajectory:
    """The body behind a reference, for the few that the driver does read; its node may be
    lost, or not answer.
    """
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            body: T = await stored.body  # type: ignore[misc]
            return body
    except (ObjectLostError, TimeoutError) as error:
        detail = f"its body was lost: {error or 'no answer'}"
        return LostTrajectory(
            key=stored.header.key,
            reason=LostReason.BODY_LOST,
            detail=detail,
        )
