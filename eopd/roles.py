"""The verbs: every contract of the loop, on one screen.

``pipeline.py`` knows only these; the two links at the end are the calls of a weight transfer
(``weights/channel.py``). Real implementations live in their rooms and are wrapped as actors in
``runtime/``; tests drive the pipeline with fakes of ten lines.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from eopd.types import (
    EvalStats,
    Float32Array,
    Int32Array,
    LearnerStats,
    LostTrajectory,
    PackedBatch,
    PolicyVersion,
    PromptSample,
    PublishStats,
    Sampling,
    ScoredTrajectory,
    Stored,
    Trajectory,
    TrajectoryKey,
)


class WorkerDownError(RuntimeError):
    """The worker of a role cannot answer, and may be lost; the request itself is not at fault."""


class EngineDownError(WorkerDownError):
    """A rollout engine is lost, or cannot answer."""


class TeacherDownError(WorkerDownError):
    """A teacher replica is lost, or its server cannot answer."""


class LearnerDownError(WorkerDownError):
    """A learner rank is lost, and with it the whole gang."""


class BodiesLostError(RuntimeError):
    """Bodies of a batch are lost with the node that held them. Nothing was trained or measured, and
    every worker is well.
    """

    def __init__(self, keys: Collection[TrajectoryKey]) -> None:
        super().__init__(f"the bodies of {len(keys)} trajectories were lost with their node")
        self.keys = frozenset(keys)


class RolloutEngine(Protocol):
    """A rollout engine samples responses with the student."""

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Samples one response; a failure is a value.

        Raises:
            EngineDownError: the engine cannot answer.
        """


class TeacherScorer(Protocol):
    """A scorer computes the teacher's log-probabilities and entropy for every response token."""

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Scores one trajectory; a failure is a value.

        Raises:
            TeacherDownError: the teacher cannot answer.
        """


class Learner(Protocol):
    """The learner trains the student towards the teacher."""

    async def accumulate(self, part: PackedBatch) -> None:
        """Adds up the gradients of a part of a batch, which ``step`` will complete; the weights
        stay as they are. Raises as ``step`` does.
        """

    async def step(self, batch: PackedBatch) -> LearnerStats:
        """Trains on one batch, or on the last part of one together with what was accumulated of it;
        raises on a broken batch, and never skips one silently.

        Raises:
            BodiesLostError: some of what was handed over is lost; none of it was trained.
            LearnerDownError: a rank is lost; the whole gang must start again from a checkpoint.
        """

    async def evaluate(self, batch: PackedBatch) -> EvalStats:
        """Measures student against teacher without an update; raises as ``step`` does."""

    async def save(self, directory: Path) -> None:
        """Writes everything that ``load`` needs to continue bit-equal."""

    async def load(self, directory: Path) -> None:
        """Restores what ``save`` wrote."""


class WeightChannel(Protocol):
    """A weight channel brings the learner's weights to every rollout engine."""

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        """Returns once every live engine serves ``version``; ``on_sent`` is called once the learner
        has sent it, and is only needed again where that fails.
        """


class SenderLink(Protocol):
    """The learner gang's ``WeightSender``, seen from the driver."""

    @property
    def reserved(self) -> AbstractAsyncContextManager[object]: ...  # noqa: D102 - no step comes between its calls
    @property
    def undisturbed(self) -> AbstractAsyncContextManager[object]: ...  # noqa: D102 - nor a part of one
    async def version(self) -> PolicyVersion: ...  # noqa: D102
    async def open(self, engines: int, secret: str) -> Sequence[Mapping[str, object]]: ...  # noqa: D102
    async def accept(self) -> None: ...  # noqa: D102
    async def send(self) -> int: ...  # noqa: D102
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102


class EngineLink(Protocol):
    """A rollout engine's weight calls, seen from the driver (``rollout/vllm_engine.py``)."""

    async def connect_weights(self, init_info: Mapping[str, object]) -> None: ...  # noqa: D102
    async def begin_weights(self) -> None: ...  # noqa: D102
    async def check_weights(self) -> None: ...  # noqa: D102
    async def install_weights(self, version: PolicyVersion) -> float: ...  # noqa: D102
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102
    async def version(self) -> PolicyVersion: ...  # noqa: D102
