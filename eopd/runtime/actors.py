"""The actors of engines and teachers, and their proxies in the driver.

    driver                              the actor's process
    RemoteEngine    generate, ...  ──▶  RolloutActor  ──▶  VllmRolloutEngine, Verifier
    RemoteTeacher   score, ping    ──▶  TeacherActor  ──▶  a scorer, by the teacher's backend, Filter

An actor is a plain class that Ray runs in a process of its own; a proxy implements a role. Bodies
never pass through the proxies: ``num_returns=2`` splits header from body, so that the driver owns a
reference to the body, and the body goes from node to node. Heavy libraries are imported inside the
actors, never in the driver.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnschedulableError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
)

from eopd.config import RolloutConfig, StudentConfig, TeacherConfig
from eopd.config.loss import Reward
from eopd.config.sections import FilterConfig
from eopd.hub import model_directory
from eopd.preflight.environment import require_engine_build
from eopd.roles import EngineDownError, TeacherDownError, WorkerDownError
from eopd.run.progress import first_line
from eopd.runtime import spawned
from eopd.runtime.process import clean_environment
from eopd.types import (
    Float32Array,
    Header,
    Int32Array,
    LostReason,
    LostTrajectory,
    PolicyVersion,
    PromptSample,
    Sampling,
    ScoredTrajectory,
    Stored,
    Trajectory,
)

if TYPE_CHECKING:
    from eopd.rewards.filtering import Filter
    from eopd.rewards.verifier import Verifier
    from eopd.rollout.vllm_engine import VllmRolloutEngine
    from eopd.teacher.base import SignalScorer

W = TypeVar("W")
Spawn = Callable[..., list[ActorHandle]]

CLOSE_TIMEOUT_S = 10.0
# A pool gives no actor more requests than this, and Ray runs more calls at a time: so weight calls
# never wait for requests. (A concurrency group of Ray's has an event loop of its own, in which
# vLLM's engine cannot be called; Ray 2.60.)
MAX_REQUESTS = 10_000
MAX_CALLS = MAX_REQUESTS + 100

Split = tuple[Header | LostTrajectory, object]


def _split(result: Stored[Trajectory] | Stored[ScoredTrajectory] | LostTrajectory) -> Split:
    """Returns two values for Ray: one for the driver to read, and the body, which it passes on."""
    return (result, None) if isinstance(result, LostTrajectory) else (result.header, result.body)


async def _join(
    references: Sequence[ray.ObjectRef], error_type: type[WorkerDownError]
) -> Stored[Any] | LostTrajectory:
    """Awaits the first value of ``_split``, and puts it together with a reference to the second.

    A call that is not awaited any more is cancelled, so that it does not keep the engine busy.
    """
    head, body = references
    try:
        with dies_as(error_type):
            header: Header | LostTrajectory = await head
    except asyncio.CancelledError:
        ray.cancel(head)
        raise

    return header if isinstance(header, LostTrajectory) else Stored(header, body)


@contextmanager
def dies_as(error_type: type[WorkerDownError]) -> Iterator[None]:
    """Raises Ray's errors of a dead actor as an error of the roles; one that the actor raised itself
    without its traceback, which Ray has made the message of it.
    """
    try:
        yield
    except WorkerDownError as error:
        raise error_type(first_line(error)) from error
    except (RayActorError, OutOfMemoryError, ActorUnschedulableError) as error:
        raise error_type(f"its actor died: {first_line(error)}") from error


async def end_actor(actor: ActorHandle) -> None:
    """Lets an actor stop its engine, then kills it; it may be dead, or hang."""
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await actor.close.remote()

    ray.kill(actor)


class Actor:
    """An actor hosts a worker in a process of its own, whose environment it cleans first. Ray puts
    its ``name`` into logs and errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        clean_environment(os.environ)
        spawned.stand_in_for_main()

    def __repr__(self) -> str:
        return self._name


class ActorProcess(Generic[W]):
    """An actor process hosts one worker of a ``Fleet``.

    Args:
        actor: the actor.
        worker: its proxy.
        error_type: the error that is raised where the actor is dead.
        arguments: the arguments of its ``start``, which returns the worker's seats.
    """

    def __init__(
        self, actor: ActorHandle, worker: W, error_type: type[WorkerDownError], *arguments: object
    ) -> None:
        self.worker = worker
        self._actor = actor
        self._error_type = error_type
        self._arguments = arguments
        self._has_started = False

    async def start(self) -> int:
        """Starts the worker; returns its seats."""
        with dies_as(self._error_type):
            seats = int(await self._actor.start.remote(*self._arguments))

        self._has_started = True
        return seats

    async def end(self) -> None:
        """Stops the worker's processes and the actor, which does not listen before it has started."""
        if self._has_started:
            await end_actor(self._actor)
        else:
            ray.kill(self._actor)


class RolloutActor(Actor):
    """A rollout actor hosts a ``VllmRolloutEngine``, and the verifier of its responses."""

    _engine: "VllmRolloutEngine"
    _verifier: "Verifier | None"
    _keeps_row: bool

    async def start(
        self,
        student: StudentConfig,
        rollout: RolloutConfig,
        max_sequence_tokens: int,
        reward: Reward | None,
        row_is_read_later: bool,
    ) -> int:
        """Starts the engine; returns its seats.

        Where the teacher's actor reads the row of a prompt too, it stays in the trajectory.
        """
        require_engine_build(rollout.gpus)
        from eopd.rewards.verifier import Verifier
        from eopd.rollout.vllm_engine import VllmRolloutEngine
        from eopd.runtime.engine_metrics import stat_loggers
        from eopd.tokenizer import num_tokens
        from eopd.weights.vllm_receiver import engine_options

        directory = model_directory(student.model, weights=True)
        self._engine = await VllmRolloutEngine.start(
            student,
            rollout,
            max_sequence_tokens=max_sequence_tokens,
            weight_options=engine_options(),
            num_tokens=num_tokens(directory),
            stat_loggers=stat_loggers(self._name),
            in_thread=True,
        )
        self._verifier = None if reward is None else Verifier(reward, directory)
        self._keeps_row = row_is_read_later

        return min(self._engine.seats, MAX_REQUESTS)

    async def generate(self, prompt: PromptSample, sample_index: int, sampling: Sampling) -> Split:
        """Samples one response, and rewards it where the run has a verifier."""
        generated = await self._engine.generate(prompt, sample_index, sampling)
        if isinstance(generated, LostTrajectory):
            return _split(generated)

        header, trajectory = generated.header, cast(Trajectory, generated.body)
        if self._verifier is not None:
            header = await self._verifier.reward(header, trajectory)

        return header, trajectory if self._keeps_row else trajectory.without_row()

    async def call(self, method: str, *arguments: object) -> object:
        """Calls another method of the engine; ``RemoteEngine`` has their types."""
        return await getattr(self._engine, method)(*arguments)

    async def close(self) -> None:
        """Stops the verifier and the engine."""
        if self._verifier is not None:
            self._verifier.close()

        await self._engine.close()


class RemoteEngine:
    """A remote engine is a ``RolloutEngine`` and an ``EngineLink``: the proxy of a rollout actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def generate(  # noqa: D102
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        call = self._actor.generate.options(num_returns=2)
        return await _join(call.remote(prompt, sample_index, sampling), EngineDownError)

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:  # noqa: D102
        await self._call("connect_weights", init_info)

    async def begin_weights(self) -> None:  # noqa: D102
        await self._call("begin_weights")

    async def check_weights(self) -> None:  # noqa: D102
        await self._call("check_weights")

    async def probe(self, token_ids: Int32Array) -> Float32Array:  # noqa: D102
        return cast(Float32Array, await self._call("probe", token_ids))

    async def install_weights(self, version: PolicyVersion) -> float:  # noqa: D102
        return cast(float, await self._call("install_weights", version))

    async def version(self) -> PolicyVersion:  # noqa: D102
        return cast(PolicyVersion, await self._call("version"))

    async def _call(self, method: str, *arguments: object) -> object:
        with dies_as(EngineDownError):
            answer: object = await self._actor.call.remote(method, *arguments)
            return answer


class TeacherActor(Actor):
    """A teacher actor hosts one replica of a teacher, and the filter of what it scores."""

    _scorer: "SignalScorer"
    _filter: "Filter | None"

    async def start(
        self,
        teacher: TeacherConfig,
        top_k: int,
        max_sequence_tokens: int,
        filtering: FilterConfig | None,
        student: str,
    ) -> int:
        """Starts the scorer; returns its seats."""
        from eopd.rewards.filtering import Filter

        start: Callable[..., Awaitable[SignalScorer]]
        match teacher.backend:
            case "vllm":
                require_engine_build(teacher.gpus)
                from eopd.runtime.engine_metrics import stat_loggers
                from eopd.teacher.vllm_scorer import VllmTeacherScorer

                loggers = stat_loggers(self._name)
                start = partial(VllmTeacherScorer.start, stat_loggers=loggers, in_thread=True)
            case "openai":
                from eopd.teacher.served.openai_scorer import OpenAITeacherScorer

                start = OpenAITeacherScorer.start
            case "eopd":
                from eopd.teacher.served.eopd_scorer import EopdTeacherScorer

                start = EopdTeacherScorer.start

        self._scorer = await start(
            teacher,
            top_k=top_k,
            max_sequence_tokens=max_sequence_tokens,
        )
        self._filter = None if filtering is None else Filter(filtering, model_directory(student))

        return min(self._scorer.seats, MAX_REQUESTS)

    async def ping(self) -> None:
        """Returns when the scorer answers."""
        await self._scorer.ping()

    async def score(self, header: Header, trajectory: Trajectory) -> Split:
        """Scores one trajectory, and filters it where the run has a filter."""
        scored = await self._scorer.score(Stored(header, trajectory))
        if self._filter is not None and isinstance(scored, Stored):
            scored = await self._filter.sift(scored)

        return _split(scored)

    async def close(self) -> None:
        """Stops the filter and the scorer."""
        if self._filter is not None:
            self._filter.close()

        await self._scorer.close()


class RemoteTeacher:
    """A remote teacher is a ``TeacherScorer``: the proxy of a teacher actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:  # noqa: D102
        call = self._actor.score.options(num_returns=2)
        try:
            return await _join(call.remote(stored.header, stored.body), TeacherDownError)
        except ObjectLostError as error:
            detail = f"its body was lost: {error}"
            return LostTrajectory(
                key=stored.header.key,
                reason=LostReason.BODY_LOST,
                detail=detail,
            )

    async def ping(self) -> None:
        """Returns when the scorer answers."""
        with dies_as(TeacherDownError):
            await self._actor.ping.remote()
