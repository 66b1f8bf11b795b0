"""What every teacher does to a trajectory, wherever its signal is computed.

    response -> teacher's copy (end tokens) -> signal -> student's vocabulary -> header's sums

In the cluster (``vllm_scorer.py``), behind a stock server (``served/openai_scorer.py``) or behind
our own (``served/eopd_scorer.py``): each only says how a signal is come by.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import cast

import numpy as np

from eopd.config import TeacherConfig
from eopd.hub import model_directory
from eopd.teacher.end_tokens import to_student, to_teacher
from eopd.teacher.signal import SignalError
from eopd.tokenizer import num_tokens
from eopd.types import (
    Int32Array,
    LostReason,
    LostTrajectory,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
    Trajectory,
)


class SignalScorer(ABC):
    """A ``TeacherScorer`` whose bodies are the ``Trajectory`` itself.

    Args:
        config: the teacher.
        top_k: K, candidates per response token.
        vocab_size: V, rows of its head.
    """

    def __init__(self, config: TeacherConfig, *, top_k: int, vocab_size: int) -> None:
        self._config, self._name = config, config.name
        self._top_k, self._vocab_size = top_k, vocab_size

    @cached_property
    def _num_tokens(self) -> int:
        return num_tokens(model_directory(self._config.model))

    @abstractmethod
    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Returns what the teacher says of a response, in its own vocabulary.

        Args:
            prompt_ids: [P], P > 0.
            response_ids: [R], R > 0.

        Raises:
            SignalError: this request failed; others go on.
            TeacherDownError: no request can be answered.
        """

    @property
    @abstractmethod
    def seats(self) -> int:
        """The number of trajectories that it scores at a time; more would wait inside."""

    @abstractmethod
    async def ping(self) -> None:
        """Return when whoever computes the signal answers; raises whatever else comes of it."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of engine or connections."""

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score one trajectory; safe to call concurrently.

        Returns:
            The scored trajectory; its header's sums gain ``score_s`` (seconds, waiting included),
            and ``teacher_logprob`` and ``teacher_entropy`` (nats, summed over response tokens; of
            bounds the middle). A request that fails is a ``LostTrajectory``.

        Raises:
            TeacherDownError: no request can be answered.
        """
        started = time.monotonic()
        trajectory, remap = cast(Trajectory, stored.body), self._config.eos_remap

        try:
            copy = to_teacher(trajectory.response_ids, trajectory.stop_reason, remap)
            said = await self.signal(_prompt_of(trajectory), copy)
        except SignalError as error:
            return LostTrajectory(
                key=stored.header.key,
                reason=LostReason.TEACHER_FAILED,
                detail=f"teacher {self._name}: {error}",
            )

        signal = to_student(
            said,
            trajectory.response_ids,
            remap,
            num_tokens=self._num_tokens,
        )
        entropy = (signal.entropy_low + signal.entropy_high) / 2
        gained = {
            "score_s": time.monotonic() - started,
            "teacher_logprob": float(signal.token_logprobs.sum(dtype=np.float64)),
            "teacher_entropy": float(entropy.sum(dtype=np.float64)),
        }
        header = replace(stored.header, sums={**stored.header.sums, **gained})

        return Stored(header, ScoredTrajectory(trajectory=trajectory, signal=signal))


def whole_sequence(vocab_size: int, prompt_ids: Int32Array, response_ids: Int32Array) -> Int32Array:
    """Returns the sequence [P + R] that a teacher reads.

    Raises:
        SignalError: an id is outside the vocabulary, which would be fatal to a whole engine.
    """
    ids = np.concatenate((prompt_ids, response_ids))
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise SignalError(f"token id {ids.max()} is outside its vocabulary of {vocab_size}")

    return ids


def _prompt_of(trajectory: Trajectory) -> Int32Array:
    """Returns what the teacher reads before the response: alignment is by response, so any prompt
    will do.
    """
    own = trajectory.prompt.teacher_token_ids
    return trajectory.prompt.token_ids if own is None else own
