"""The actors, and what the driver sees of them.

Every pair below is a plain class that Ray runs in a process of its own, and a proxy in the driver
that implements a role. Bodies never pass through the proxies: ``num_returns=2`` splits header from
body, so that the driver owns a reference to the body, and the body goes from node to node. Heavy
libraries are imported inside the actors, never in the driver.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

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
from eopd.config.loss import GraderName
from eopd.roles import EngineDownError, TeacherDownError, WorkerDownError
from eopd.runtime import spawned
from eopd.runtime.process import settle
from eopd.types import (
    Float32Array,
    Header,
    Int32Array,
    LossReason,
    LostTrajectory,
    PolicyVersion,
    PromptSample,
    Sampling,
    ScoredTrajectory,
    Stored,
    Trajectory,
)

if TYPE_CHECKING:
    from eopd.rewards.verifier import Verifier
    from eopd.rollout.vllm_engine import VllmRolloutEngine
    from eopd.teacher.base import SignalScorer

Spawn = Callable[..., list[ActorHandle]]

CLOSE_TIMEOUT_S = 20.0
# A pool gives no actor more requests than this, and Ray runs some calls more: so weight calls never
# wait for requests. (A concurrency group of Ray's has an event loop of its own, in which vLLM's
# engine cannot be called; Ray 2.60.)
MAX_REQUESTS = 10_000
MAX_CALLS = MAX_REQUESTS + 100

Split = tuple[Header | LostTrajectory, object]


def _split(result: Stored[Trajectory] | Stored[ScoredTrajectory] | LostTrajectory) -> Split:
    """Two return values for Ray: what the driver reads, and what it only passes on."""
    return (result, None) if isinstance(result, LostTrajectory) else (result.header, result.body)


@contextmanager
def dies_as(error_type: type[WorkerDownError]) -> Iterator[None]:
    """What Ray says of a dead actor, as the roles say it."""
    try:
        yield
    except (RayActorError, OutOfMemoryError, ActorUnschedulableError) as error:
        raise error_type(f"its actor died: {error}") from error


async def _or_cancel(head: "ray.ObjectRef[Header | LostTrajectory]") -> Header | LostTrajectory:
    """Await; what is not awaited any more must not keep the engine busy."""
    try:
        header: Header | LostTrajectory = await head
        return header
    except asyncio.CancelledError:
        ray.cancel(head)
        raise


async def end(actor: ActorHandle) -> None:
    """Let an actor stop its engine's processes, then kill it for certain; it may be dead, or
    hang.
    """
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await actor.close.remote()

    ray.kill(actor)


class Actor:
    """``name`` stands in logs and errors: Ray takes it from here. The environment of its
    process is put right first.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        settle(os.environ)
        spawned.stand_in_for_main()

    def __repr__(self) -> str:
        return self._name


class RolloutActor(Actor):
    """Hosts a ``VllmRolloutEngine``, and the verifier of what it writes."""

    _engine: "VllmRolloutEngine"
    _verifier: "Verifier | None"

    async def start(  # noqa: D102
        self,
        student: StudentConfig,
        rollout: RolloutConfig,
        max_sequence_tokens: int,
        version: PolicyVersion,
        grader: GraderName | None,
    ) -> int:
        from eopd.rewards.verifier import Verifier
        from eopd.rollout.vllm_engine import VllmRolloutEngine
        from eopd.runtime.engine_metrics import stat_loggers
        from eopd.tokenizer import num_tokens
        from eopd.weights.vllm_receiver import engine_options

        self._engine = await VllmRolloutEngine.start(
            student,
            rollout,
            max_sequence_tokens=max_sequence_tokens,
            weight_options=engine_options(),
            version=version,
            num_tokens=num_tokens(student.model),
            stat_loggers=stat_loggers(self._name),
        )
        self._verifier = None if grader is None else Verifier(grader, student.model)

        return min(self._engine.seats, MAX_REQUESTS)

    async def generate(self, prompt: PromptSample, sample_index: int, sampling: Sampling) -> Split:  # noqa: D102
        written = await self._engine.generate(prompt, sample_index, sampling)
        if self._verifier is None or isinstance(written, LostTrajectory):
            return _split(written)

        reward = await self._verifier.reward(cast(Trajectory, written.body))
        return replace(written.header, reward=reward), written.body

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:  # noqa: D102
        await self._engine.connect_weights(init_info)

    async def receive_weights(self) -> None:  # noqa: D102
        await self._engine.receive_weights()

    async def check_weights(self) -> None:  # noqa: D102
        await self._engine.check_weights()

    async def install_weights(self, version: PolicyVersion) -> float:  # noqa: D102
        return await self._engine.install_weights(version)

    async def probe(self, token_ids: Int32Array) -> Float32Array:  # noqa: D102
        return await self._engine.probe(token_ids)

    async def version(self) -> PolicyVersion:  # noqa: D102
        return await self._engine.version()

    async def close(self) -> None:  # noqa: D102
        if self._verifier is not None:
            self._verifier.close()

        await self._engine.close()


class RemoteEngine:
    """A ``RolloutEngine`` and an ``EngineLink``: one rollout actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def generate(  # noqa: D102
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        head, body = self._actor.generate.options(num_returns=2).remote(
            prompt, sample_index, sampling
        )
        with dies_as(EngineDownError):
            header = await _or_cancel(head)

        return header if isinstance(header, LostTrajectory) else Stored(header, body)

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:  # noqa: D102
        with dies_as(EngineDownError):
            await self._actor.connect_weights.remote(init_info)

    async def receive_weights(self) -> None:  # noqa: D102
        with dies_as(EngineDownError):
            await self._actor.receive_weights.remote()

    async def check_weights(self) -> None:  # noqa: D102
        with dies_as(EngineDownError):
            await self._actor.check_weights.remote()

    async def probe(self, token_ids: Int32Array) -> Float32Array:  # noqa: D102
        with dies_as(EngineDownError):
            return cast(Float32Array, await self._actor.probe.remote(token_ids))

    async def install_weights(self, version: PolicyVersion) -> float:  # noqa: D102
        with dies_as(EngineDownError):
            return float(await self._actor.install_weights.remote(version))

    async def version(self) -> PolicyVersion:  # noqa: D102
        with dies_as(EngineDownError):
            return PolicyVersion(*await self._actor.version.remote())


class TeacherActor(Actor):
    """Hosts one replica of a teacher."""

    _scorer: "SignalScorer"

    async def start(self, teacher: TeacherConfig, top_k: int, max_sequence_tokens: int) -> int:  # noqa: D102
        start: Callable[..., Awaitable[SignalScorer]]
        match teacher.backend:
            case "vllm":
                from eopd.runtime.engine_metrics import stat_loggers
                from eopd.teacher.vllm_scorer import VllmTeacherScorer

                start = partial(VllmTeacherScorer.start, stat_loggers=stat_loggers(self._name))
            case "openai":
                from eopd.teacher.served.openai_scorer import OpenAITeacherScorer

                start = OpenAITeacherScorer.start
            case "eopd":
                from eopd.teacher.served.eopd_scorer import EopdTeacherScorer

                start = EopdTeacherScorer.start

        self._scorer = await start(teacher, top_k=top_k, max_sequence_tokens=max_sequence_tokens)

        return min(self._scorer.seats, MAX_REQUESTS)

    async def ping(self) -> None:  # noqa: D102
        await self._scorer.ping()

    async def score(self, header: Header, trajectory: Trajectory) -> Split:  # noqa: D102
        return _split(await self._scorer.score(Stored(header, trajectory)))

    async def close(self) -> None:  # noqa: D102
        await self._scorer.close()


class RemoteTeacher:
    """A ``TeacherScorer``: one teacher actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:  # noqa: D102
        head, body = self._actor.score.options(num_returns=2).remote(stored.header, stored.body)
        try:
            with dies_as(TeacherDownError):
                header = await _or_cancel(head)
        except ObjectLostError as error:
            detail = f"its body was lost: {error}"
            return LostTrajectory(
                key=stored.header.key, reason=LossReason.TEACHER_FAILED, detail=detail
            )

        return header if isinstance(header, LostTrajectory) else Stored(header, body)

    async def ping(self) -> None:
        """Return when the scorer answers."""
        with dies_as(TeacherDownError):
            await self._actor.ping.remote()
