"""The verbs: every contract between rooms, on one screen.

``pipeline.py`` knows only these. Real implementations live in their rooms and are wrapped as actors
in ``runtime/``; tests drive the pipeline with fakes of ten lines.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from eopd.types import (
    EvalStats,
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
    """Whoever plays a role cannot answer: nothing is wrong with what was asked, and the
    worker may be lost.
    """


class EngineDownError(WorkerDownError):
    """A rollout engine is gone, or of no use."""


class TeacherDownError(WorkerDownError):
    """The teacher behind a scorer is."""


class LearnerDownError(WorkerDownError):
    """A learner rank is, and with it the whole gang."""


class BodiesLostError(RuntimeError):
    """Bodies of a batch are gone, with the node that held them: nothing was trained or
    measured, and nobody is lost.
    """

    def __init__(self, keys: Collection[TrajectoryKey]) -> None:
        super().__init__(f"the bodies of {len(keys)} trajectories were lost with their node")
        self.keys = frozenset(keys)


class RolloutEngine(Protocol):
    """Writes responses with the student."""

    async def generate(
        self, prompt: PromptSample, sample_index: int, sampling: Sampling
    ) -> Stored[Trajectory] | LostTrajectory:
        """Sample one response; a failure is a value, ``EngineDownError`` says that there is
        no one to ask.
        """
        ...


class TeacherScorer(Protocol):
    """Reads along: log-probabilities and entropy of the teacher for every response token."""

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score one trajectory; a failure is a value, ``TeacherDownError`` says that there is
        no one to ask.
        """
        ...


class Learner(Protocol):
    """Pulls the student towards the teacher."""

    async def step(self, batch: PackedBatch) -> LearnerStats:
        """One update from one batch; raises on a broken batch, never skips silently.

        Raises:
            BodiesLostError: some of it is gone; nothing was trained.
            LearnerDownError: a rank is lost; the whole gang must start again from a checkpoint.
        """
        ...

    async def evaluate(self, batch: PackedBatch) -> EvalStats:
        """Measure student against teacher without an update; raises as ``step`` does."""
        ...

    async def save(self, directory: Path) -> None:
        """Write everything ``load`` needs to continue bit-equal."""
        ...

    async def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote."""
        ...


class WeightChannel(Protocol):
    """Brings the learner's weights to every rollout engine."""

    async def publish(self, version: PolicyVersion) -> PublishStats:
        """Return when every live engine serves ``version``."""
        ...
