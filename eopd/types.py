"""The nouns: the values that travel between the rooms. They are frozen and hold numpy arrays only.
No stage changes a value; it makes a new one where it has something to add: the epoch of a prompt
that is issued, the reward and the ``sums`` of a header.

Alignment, stated once: every per-token array is indexed by *response position*. Index r speaks
about ``response_ids[r]``, which a model predicts from its hidden state at sequence position ``P + r
- 1`` (P = prompt length). ``loss_mask`` is data, set where tokens are made; it is never inferred
from pad ids.

Worked example: prompt ``[5, 6]``, response ``[7, 8, 2]`` where 2 is the end token. P = 2, R = 3;
``rollout_logprobs[0]`` is log b(7 | 5 6), and the hidden state at sequence position 1 predicts it.

Entropies and KL are in nats, durations end in ``_s``, sizes in ``_tokens`` or ``_bytes``.
Axes: P prompt, R response, K teacher candidates.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, NamedTuple, Self, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

T = TypeVar("T", covariant=True)

ENTROPY_BIN_NATS = 0.2  # the paper's threshold, 0.8 nats, is an edge
NUM_ENTROPY_BINS = 60  # to 12 nats: the logarithm of a vocabulary of 162,754


class TrajectoryKey(NamedTuple):
    """Names one trajectory for the whole life of a run."""

    epoch: int
    prompt_id: str
    sample_index: int


class PolicyVersion(NamedTuple):
    """A policy version names one set of weights of the student: the number of completed
    ``Learner.step`` calls, under one incarnation of the learner.

    After a roll-back the incarnation grows, so that no label ever means two sets of weights.
    """

    incarnation: int
    step: int

    @property
    def label(self) -> str:
        """Returns the text that engines carry, e.g. ``"0.7"``."""
        return f"{self.incarnation}.{self.step}"

    @classmethod
    def parse(cls, label: str) -> Self:
        """Reads a label; raises ValueError on anything that ``label`` did not write."""
        incarnation, _, step = label.partition(".")
        return cls(int(incarnation), int(step))


class StopReason(StrEnum):
    """A stop reason is why a response ended."""

    END_TOKEN = "end_token"
    LENGTH = "length"


class LostReason(StrEnum):
    """A loss reason is why a trajectory was lost. It is a metric label, so the set stays small."""

    BODY_LOST = "body_lost"
    FILTER_FAILED = "filter_failed"
    FILTERED = "filtered"  # no failure: the filter of the run dropped it
    ROLLOUT_FAILED = "rollout_failed"
    TEACHER_FAILED = "teacher_failed"
    TOO_STALE = "too_stale"


Reference = str | tuple[str, ...]  # the accepted answer, or several of which any one is right


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSample:
    """A prompt sample is one prompt of one epoch. ``source`` routes to a teacher and labels metrics.

    ``teacher_token_ids`` [P'] is the prompt of that teacher, where it differs from the student's.
    ``row`` is the row of the data (``plugins.Row``): only training prompts have it, and only where
    the run has a reward or a filter, which read it.
    """

    epoch: int
    prompt_id: str
    source: str
    token_ids: Int32Array  # [P]
    reference_answer: Reference | None
    teacher_token_ids: Int32Array | None = None
    row: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A response is sampled from the plain softmax at ``temperature``, so that the recorded
    log-probability is the policy's own, and with a seed of its own. Of two requests that wait for a
    worker the one with the lower ``priority`` goes first; below 0 are those of evaluation.

    ``top_p`` and ``stop`` are for benchmarks alone, which record no log-probabilities for training:
    the smallest set of tokens that has this probability is sampled from, and a response ends with
    the first of these texts that it holds.
    """

    temperature: float
    max_tokens: int
    seed: int
    priority: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A trajectory is a prompt and one sampled response to it, which includes the end token."""

    prompt: PromptSample
    sample_index: int
    response_ids: Int32Array  # [R]
    loss_mask: BoolArray  # [R]
    rollout_logprobs: Float32Array  # [R], at the sampling temperature
    policy_versions: Int32Array  # [R], PolicyVersion.step of the weights that sampled the token
    stop_reason: StopReason

    @property
    def key(self) -> TrajectoryKey:
        """Returns the trajectory's name."""
        return TrajectoryKey(self.prompt.epoch, self.prompt.prompt_id, self.sample_index)

    def without_row(self) -> Self:
        """Returns the same trajectory without the row of its prompt, which nobody reads any more."""
        if self.prompt.row is None:
            return self

        return replace(self, prompt=replace(self.prompt, row=None))


@dataclass(frozen=True, slots=True)
class Exact:
    """The teacher's entropy is known exactly, from the full softmax."""

    entropy: Float32Array  # [R]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The teacher's entropy lies within these bounds, where only top-k log-probabilities are known."""

    low: Float32Array  # [R]
    high: Float32Array  # [R]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal:
    """A teacher signal is what a teacher computed for every response token, at its temperature."""

    teacher: str
    token_logprobs: Float32Array  # [R], log q(response_ids[r])
    entropy: Exact | Bounds
    topk_ids: Int32Array  # [R, K], most likely first
    topk_logprobs: Float32Array  # [R, K]
    tail_logprobs: Float32Array  # [R], log of the mass outside the top k; -inf where k = V

    @property
    def entropy_low(self) -> Float32Array:
        """Returns the entropy [R] where it is exact, else its lower bound."""
        return self.entropy.entropy if isinstance(self.entropy, Exact) else self.entropy.low

    @property
    def entropy_high(self) -> Float32Array:
        """Returns the entropy [R] where it is exact, else its upper bound."""
        return self.entropy.entropy if isinstance(self.entropy, Exact) else self.entropy.high


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrajectory:
    """A scored trajectory has the signal of its teacher."""

    trajectory: Trajectory
    signal: TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header is all that the driver sees of a trajectory.

    ``sums`` are summed over response tokens or are seconds spent, e.g. ``{"generate_s": 1.2}``.
    ``response_crc32`` is the checksum of the bytes of ``response_ids``: it is equal where two runs
    sampled the same tokens.
    """

    key: TrajectoryKey
    source: str
    num_prompt_tokens: int
    num_response_tokens: int
    num_loss_tokens: int
    stop_reason: StopReason
    oldest_version: int
    newest_version: int
    response_crc32: int
    sums: Mapping[str, float]
    reward: float | None = None  # where the run has a reward, and its function gave one
    reward_fault: str | None = None  # why it gave none
    priority: int = 0  # as in ``Sampling``

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        sums: Mapping[str, float],
        reward: float | None = None,
        priority: int = 0,
    ) -> Self:
        """Returns the header of a trajectory, which has at least one response token."""
        return cls(
            key=trajectory.key,
            source=trajectory.prompt.source,
            num_prompt_tokens=len(trajectory.prompt.token_ids),
            num_response_tokens=len(trajectory.response_ids),
            num_loss_tokens=int(trajectory.loss_mask.sum()),
            stop_reason=trajectory.stop_reason,
            oldest_version=int(trajectory.policy_versions.min()),
            newest_version=int(trajectory.policy_versions.max()),
            response_crc32=crc32(trajectory.response_ids.tobytes()),
            sums=sums,
            reward=reward,
            priority=priority,
        )

    @property
    def num_tokens(self) -> int:
        """Returns the tokens of prompt and response together, which count against token budgets."""
        return self.num_prompt_tokens + self.num_response_tokens


@dataclass(frozen=True, slots=True)
class Stored(Generic[T]):
    """A stored object is a header and a body of type T.

    The body is opaque to the driver: there it is a reference of Ray's, and inside of an actor the
    object itself.
    """

    header: Header
    body: object


@dataclass(frozen=True, slots=True, kw_only=True)
class LostTrajectory:
    """A lost trajectory is a failure as a value: it is counted, and sampled again. One that was
    ``FILTERED`` is none: it is dropped at once.
    """

    key: TrajectoryKey
    reason: LostReason
    detail: str


MicroBatch = tuple[Stored[ScoredTrajectory], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """An optimiser step holds the micro-batches of rank r in ``ranks[r]``: equally many on every
    rank, so that a short rank gets empty ones. ``num_loss_tokens`` is counted over all ranks; those
    of all parts of a step together are the denominator of its loss.
    """

    num_loss_tokens: int
    ranks: tuple[tuple[MicroBatch, ...], ...]

    def map(self, change: Callable[[Stored[ScoredTrajectory]], Stored[ScoredTrajectory]]) -> Self:
        """Returns the same step with every trajectory changed, in order."""
        ranks = []
        for rank in self.ranks:
            micro_batches = [tuple(map(change, micro)) for micro in rank]
            ranks.append(tuple(micro_batches))
        return replace(self, ranks=tuple(ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A packed batch is a batch cut into optimiser steps, and these for the learner ranks."""

    steps: tuple[OptimizerStep, ...]
    alpha: float

    def share(self, rank: int) -> Self:
        """Returns the batch of one rank; denominators stay global."""
        steps = tuple(replace(step, ranks=(step.ranks[rank],)) for step in self.steps)
        return type(self)(steps=steps, alpha=self.alpha)

    def with_bodies(self, bodies: Iterable[object]) -> Self:
        """Returns the same batch with other bodies, at least as many, in the order of ``stored``."""
        following = iter(bodies)
        steps = [
            step.map(lambda stored: Stored(stored.header, next(following))) for step in self.steps
        ]
        return replace(self, steps=tuple(steps))

    def stored(self) -> Sequence[Stored[ScoredTrajectory]]:
        """Returns every trajectory, in the order of the micro-batches."""
        return [
            stored
            for step in self.steps
            for rank in step.ranks
            for micro in rank
            for stored in micro
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStats:
    """Learner stats describe one ``Learner.step``, reduced over ranks. Keys of ``metrics`` are names
    of the catalogue. ``skipped_steps`` counts all optimiser steps so far that were not finite.
    """

    version: PolicyVersion
    metrics: Mapping[str, float]
    skipped_steps: int = 0


ByPrompt = Mapping[str, Mapping[str, float]]  # metric -> prompt id -> number


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalStats:
    """Eval stats compare student and teacher on held-out prompts, prompt by prompt.

    ``by_prompt`` has means over the loss tokens of a prompt's response, in nats: reverse_kl of
    log p(y) - log q(y) over sampled tokens, forward_kl of the ``tail`` form, student_entropy and
    teacher_entropy; and top1_agreement, the share of positions with equal argmax. ``tokens`` is the
    number of the loss tokens, by which the prompts weigh in a mean over all of them. ``reverse_kl:
    PART``, ``forward_kl: PART`` and ``tokens: PART`` are those of a part of the tokens: those where
    the teacher is unsure (the gate opens, and a token counts as far as it does), those where it is
    sure, and those of each ``source`` of prompts, where there are several. A prompt without tokens
    of a part weighs 0 in it.

    The counts are a histogram of the loss tokens by entropy: ``NUM_ENTROPY_BINS`` bins, each
    ``ENTROPY_BIN_NATS`` wide from 0 on, the last one open above. ``num_dropped`` prompts could not
    be measured.
    """

    by_prompt: ByPrompt
    student_entropy_counts: tuple[int, ...]
    teacher_entropy_counts: tuple[int, ...]
    num_dropped: int = 0

    @property
    def num_prompts(self) -> int:
        """The number of prompts that were measured."""
        return len(self.by_prompt["tokens"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishStats:
    """Publish stats describe one completed weight sync: every live engine serves ``version``.

    ``probe_nats`` is how far engines were from the learner on the probe (``weights/probe.py``); None
    where this sync was not probed.
    """

    version: PolicyVersion
    transfer_s: float
    pause_s: float
    num_bytes: int
    probe_nats: float | None = None


Span = tuple[float, float]  # from and to, in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A completed step of the loop: a batch is trained, and its weights are published.

    ``trained`` are its headers by issue number. ``spans`` says when in the step, from its start,
    an engine generated, a teacher scored, and the learner did what: wait_rollout, wait_teacher,
    train, weights. ``seconds`` has the length of each, of both waits together, of the step, and
    of the time between the step before and this one (0 for the first).
    ``in_flight`` and ``ready`` count the other trajectories when the batch was full.
    """

    trained: Mapping[int, Header]
    stats: LearnerStats
    published: PublishStats
    seconds: Mapping[str, float]
    spans: Mapping[str, Sequence[Span]]
    in_flight: int
    ready: int


class RunFailedError(RuntimeError):
    """The run ends with exit code 1. The message is all that a person needs: it is shown without a
    traceback.
    """


@contextmanager
def first_failure(*kinds: type[Exception]) -> Iterator[None]:
    """Raises of a group of errors the first ``RunFailedError`` or other one of ``kinds``, for a person,
    and otherwise the group.
    """
    told: tuple[type[Exception], ...] = (RunFailedError, *kinds)
    try:
        yield
    except ExceptionGroup as errors:
        if (failures := errors.subgroup(told)) is not None:
            raise failures.exceptions[0] from None

        raise


class WeightTransferError(RuntimeError):
    """New weights did not reach an engine whole. None of them was loaded: the old ones stay.

    ``ranks`` are the members of the group that are known to have caused it; the sender is rank 0.
    """

    def __init__(self, message: str, ranks: Collection[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
