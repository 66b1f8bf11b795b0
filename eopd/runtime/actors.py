"""The actors, and what the driver sees of them.

Every pair below is a plain class that Ray runs in a process of its own, and a proxy in the driver that implements a
role. Bodies never pass through the proxies: ``num_returns=2`` splits header from body, so that the driver owns a
reference to the body, and the body goes from node to node. Heavy libraries are imported inside the actors, never in the
driver.
"""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, ObjectLostError, OutOfMemoryError, RayActorError

from eopd.config import Config, RolloutConfig, StudentConfig, TeacherConfig
from eopd.config.loss import GraderName
from eopd.roles import TeacherDownError
from eopd.runtime.run_directory import RunDirectory
from eopd.types import (
    EvalStats,
    Header,
    LearnerStats,
    LossReason,
    LostTrajectory,
    OptimizerStep,
    PackedBatch,
    PolicyVersion,
    PromptSample,
    Sampling,
    ScoredTrajectory,
    Stored,
    Trajectory,
)

if TYPE_CHECKING:
    from eopd.evaluation.verifier import Verifier
    from eopd.learner.learner import LearnerRank
    from eopd.rollout.engine import VllmRolloutEngine
    from eopd.teacher.scoring import SignalScorer
    from eopd.weights.transfer import WeightSender

Split = tuple[Header | LostTrajectory, object]


def _split(result: Stored[Trajectory] | Stored[ScoredTrajectory] | LostTrajectory) -> Split:
    """Two return values for Ray: what the driver reads, and what it only passes on."""
    return (result, None) if isinstance(result, LostTrajectory) else (result.header, result.body)


class RolloutActor:
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
    ) -> None:
        from eopd.evaluation.verifier import Verifier
        from eopd.rollout.engine import VllmRolloutEngine
        from eopd.weights.vllm_engine import ENGINE_NAME

        self._engine = await VllmRolloutEngine.start(
            student,
            rollout,
            max_sequence_tokens=max_sequence_tokens,
            weight_backend=ENGINE_NAME,
            version=version,
        )
        self._verifier = None if grader is None else Verifier(grader, student.model)

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

    async def install_weights(self, version: PolicyVersion) -> float:  # noqa: D102
        return await self._engine.install_weights(version)

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
        head, body = self._actor.generate.options(num_returns=2).remote(prompt, sample_index, sampling)
        header = await head
        return header if isinstance(header, LostTrajectory) else Stored(header, body)

    async def connect_weights(self, init_info: Mapping[str, object]) -> None:  # noqa: D102
        await self._actor.connect_weights.remote(init_info)

    async def receive_weights(self) -> None:  # noqa: D102
        await self._actor.receive_weights.remote()

    async def install_weights(self, version: PolicyVersion) -> float:  # noqa: D102
        return float(await self._actor.install_weights.remote(version))

    async def version(self) -> PolicyVersion:  # noqa: D102
        return PolicyVersion(*await self._actor.version.remote())


class TeacherActor:
    """Hosts one replica of a teacher."""

    _scorer: "SignalScorer"

    async def start(self, teacher: TeacherConfig, top_k: int, max_sequence_tokens: int) -> None:  # noqa: D102
        match teacher.backend:
            case "vllm":
                from eopd.teacher.scorer import VllmTeacherScorer as Scorer
            case "openai":
                from eopd.teacher.remote import OpenAITeacherScorer as Scorer  # type: ignore[assignment]
            case "eopd":
                from eopd.teacher.client import EopdTeacherScorer as Scorer  # type: ignore[assignment]
        self._scorer = await Scorer.start(teacher, top_k=top_k, max_sequence_tokens=max_sequence_tokens)

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
            header = await head
        except asyncio.CancelledError:  # asked too late: what is not read any more must not keep the engine busy
            ray.cancel(head)
            raise
        except (RayActorError, OutOfMemoryError, ActorUnschedulableError) as error:
            raise TeacherDownError(f"its actor died: {error}") from error
        except ObjectLostError as error:
            detail = f"its body was lost: {error}"
            return LostTrajectory(key=stored.header.key, reason=LossReason.TEACHER_FAILED, detail=detail)
        return header if isinstance(header, LostTrajectory) else Stored(header, body)


class LearnerActor:
    """Hosts one ``LearnerRank`` and its end of the weight channel."""

    _rank: "LearnerRank"
    _sender: "WeightSender"

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port on it, for the gang to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, config: Config, rank: int, address: str, port: int) -> None:  # noqa: D102
        from eopd.learner.learner import LearnerRank
        from eopd.learner.lora import whole_tensors
        from eopd.weights.source import ModelSource
        from eopd.weights.transfer import WeightSender

        self._rank = LearnerRank(
            config.student,
            config.learner,
            config.loss,
            temperature=config.rollout.temperature,
            total_batches=config.run.batches,
            seed=config.run.seed,
            entropy_bounds={teacher.name: teacher.entropy_bound for teacher in config.teachers},
            broken=RunDirectory(config.run.path).broken,
            rank=rank,
            world_size=config.learner.ranks,
            master_address=address,
            master_port=port,
        )
        self._sender = WeightSender(
            ModelSource(whole_tensors(self._rank.model), rank=rank, zero_stage=config.learner.zero_stage),
            rank=rank,
            backend=config.weights.backend,
            address=address,
            bucket_bytes=config.weights.bucket_bytes,
            timeout_s=config.weights.timeout_s,
        )

    def step(self, share: PackedBatch, *bodies: object) -> LearnerStats:
        """``bodies`` are this rank's, in the order of ``share.stored()``; Ray has fetched them."""
        return self._rank.step(_with_bodies(share, bodies))

    def evaluate(self, share: PackedBatch, *bodies: object) -> EvalStats:  # noqa: D102
        return self._rank.evaluate(_with_bodies(share, bodies))

    def save(self, directory: Path) -> None:  # noqa: D102
        self._rank.save(directory)

    def load(self, directory: Path) -> None:  # noqa: D102
        self._rank.load(directory)

    def version(self) -> PolicyVersion:  # noqa: D102
        return self._rank.version

    def export(self, directory: Path) -> None:  # noqa: D102
        self._rank.export(directory)

    def open_wire(self, engine_workers: Sequence[int]) -> list[dict[str, object]]:  # noqa: D102
        return self._sender.open(engine_workers)

    def accept_engines(self) -> None:  # noqa: D102
        self._sender.accept()

    def send_weights(self) -> int:  # noqa: D102
        return self._sender.send()

    def close(self) -> None:  # noqa: D102
        self._rank.close()


class LearnerGang:
    """A ``Learner`` and a ``SenderLink``: all learner actors, called together."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._actors = actors

    async def start(self, config: Config) -> None:
        """Bring up all ranks: they meet at rank 0."""
        address, port = await self._actors[0].rendezvous.remote()
        await asyncio.gather(
            *(actor.start.remote(config, rank, address, port) for rank, actor in enumerate(self._actors))
        )

    async def step(self, batch: PackedBatch) -> LearnerStats:  # noqa: D102
        return (await self._each_share("step", batch))[0]  # type: ignore[return-value]

    async def evaluate(self, batch: PackedBatch) -> EvalStats:  # noqa: D102
        return (await self._each_share("evaluate", batch))[0]  # type: ignore[return-value]

    async def save(self, directory: Path) -> None:  # noqa: D102
        await self._each("save", directory)

    async def load(self, directory: Path) -> None:  # noqa: D102
        await self._each("load", directory)

    async def export(self, directory: Path) -> None:
        """Write the student as a Hugging Face directory."""
        await self._each("export", directory)

    async def version(self) -> PolicyVersion:
        """The weights the ranks hold."""
        return PolicyVersion(*(await self._each("version"))[0])  # type: ignore[misc]

    async def open(self, engine_workers: Sequence[int]) -> Sequence[Mapping[str, object]]:  # noqa: D102
        return (await self._each("open_wire", engine_workers))[0]  # type: ignore[return-value]

    async def accept(self) -> None:  # noqa: D102
        await self._each("accept_engines")

    async def send(self) -> int:  # noqa: D102
        return (await self._each("send_weights"))[0]  # type: ignore[return-value]

    async def _each(self, method: str, *arguments: object) -> list[object]:
        return list(await asyncio.gather(*(getattr(actor, method).remote(*arguments) for actor in self._actors)))

    async def _each_share(self, method: str, batch: PackedBatch) -> list[object]:
        shares = [batch.share(rank) for rank in range(len(self._actors))]
        calls = (
            getattr(actor, method).remote(_with_bodies(share), *(stored.body for stored in share.stored()))
            for actor, share in zip(self._actors, shares, strict=True)
        )
        return list(await asyncio.gather(*calls))


def _with_bodies(share: PackedBatch, bodies: Sequence[object] | None = None) -> PackedBatch:
    """The same batch with other bodies, in order; with none, bare headers that travel as they are."""
    source = iter(bodies) if bodies is not None else None
    return PackedBatch(
        steps=tuple(
            OptimizerStep(
                num_loss_tokens=step.num_loss_tokens,
                ranks=tuple(
                    tuple(
                        tuple(Stored(stored.header, next(source) if source else None) for stored in micro)
                        for micro in rank
                    )
                    for rank in step.ranks
                ),
            )
            for step in share.steps
        ),
        alpha=share.alpha,
    )
