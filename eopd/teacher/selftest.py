"""The live self-test: does a running teacher say what a teacher can say, and do its replicas agree?

In: replicas of one teacher, behind the ``TeacherScorer`` role, and a prompt. Out: a
``SelfTestReport``, or the first check that failed. Everything is seen from outside, so any backend
can be tested. The first replica builds a greedy continuation, one request a token; every replica
scores it twice, and once more with another first token:

    mass         candidates are sorted and distinct; they and the tail add up to probability one
    entropy      lies between the bounds that candidates and tail leave: all are of one distribution, one temperature
    alignment    every token is the first candidate of its own position: a row is not about a later one
    context      another first token moves the second row, and not its own: a row is not about an earlier one
    repeat       the second time says the same as the first
    replicas     every replica says the same as the first one

From one temperature's answers the temperature cannot be told, so an engine of ours looks at it
where it can ask for another (``check_temperature``): when it starts. Left out: that of a stock
server, which must be 1 and is not stated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np

from eopd.roles import TeacherScorer
from eopd.types import (
    Float32Array,
    Header,
    Int32Array,
    LostTrajectory,
    PromptSample,
    RunFailedError,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

CONTINUATION_TOKENS: Final = 8
# nats, same request
TOLERANCE: Final[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
ALIGNMENT: Final = 0.05  # nats: another prefill may break a tie another way
LOGIT_STEP: Final = 0.25  # nats: between 32 and 64 two bfloat16 logits differ by this or not at all
# relative: both answers are of the same two sequences, divided in float32
TEMPERATURE: Final = 1e-2
_ROUNDING: Final = 1e-3  # nats, or probability: float32 sums over a vocabulary


class TeacherSelfTestError(RunFailedError):
    """A replica failed a check; names the replica, the check and the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """What was seen. ``worst`` has the largest deviation of every check: nats, of ``mass``
    probability.
    """

    teacher: str
    replicas: int
    continuation: tuple[int, ...]
    worst: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """Says in one sentence how the test ended; ``str`` of the report has the deviations."""
        number = (
            "its engine answers" if self.replicas == 1 else f"its {self.replicas} engines answer"
        )
        return f"teacher {self.teacher}: {number} as a teacher must"

    def __str__(self) -> str:
        worst = ", ".join(f"{check} {deviation:.2g}" for check, deviation in self.worst.items())
        return f"teacher {self.teacher}: {self.replicas} tested; off by at most {worst}"


async def self_test(
    replicas: Sequence[TeacherScorer],
    *,
    prompt_ids: Int32Array,
    vocab_size: int,
    dtype: str,
    rounded_logits: bool = False,
) -> SelfTestReport:
    """Test a teacher that runs.

    Args:
        replicas: one or more of one teacher; the body they take and give is the object itself.
        prompt_ids: [P], any text; better one of the run's own prompts.
        vocab_size: V, rows of the teacher's head.
        dtype: the teacher's, for the tolerance: 1e-4 nats in float32, 0.05 in half precision.
        rounded_logits: whether its logits are of ``dtype`` too; in bfloat16 the tolerance is one
            step of them, 0.25.

    Raises:
        TeacherSelfTestError: names replica, check and numbers.
    """
    continuation = await _continue(replicas[0], prompt_ids)
    elsewhere = continuation.copy()
    elsewhere[0] = (continuation[0] + 1) % vocab_size
    step = LOGIT_STEP if rounded_logits and dtype == "bfloat16" else 0.0
    same, aligned = max(TOLERANCE[dtype], step), max(ALIGNMENT, step)
    worst: dict[str, float] = {}
    signals: list[TeacherSignal] = []

    for number, replica in enumerate(replicas):
        signal, again, moved = [
            await _score(replica, number, prompt_ids, response)
            for response in (continuation, continuation, elsewhere)
        ]
        signals.append(signal)
        found = {
            "mass": (_mass_error(signal), _ROUNDING),
            "entropy": (_entropy_error(signal, vocab_size), _ROUNDING),
            "alignment": (_alignment_error(signal), aligned),
            "context": (_context_error(signal, moved, same), same),
            "repeat": (_difference(signal, again), same),
            "replicas": (_difference(signals[0], signal), same),
        }

        for check, (deviation, allowed) in found.items():
            worst[check] = max(deviation, worst.get(check, 0.0))
            if not deviation <= allowed:  # NaN fails
                raise TeacherSelfTestError(
                    _failure(number, check, deviation, allowed, continuation, signal)
                )

    return SelfTestReport(
        teacher=signals[0].teacher,
        replicas=len(replicas),
        continuation=tuple(continuation.tolist()),
        worst=worst,
    )


def check_temperature(
    own: TeacherSignal, other: TeacherSignal, temperature: float, *, expected: float
) -> None:
    """Tell a teacher's temperature from what tokens lack to the first candidate, which it divides.

    Args:
        own: of any response, at the teacher's own temperature.
        other: of the same response, at ``temperature`` on request.
        temperature: another one than ``expected``.
        expected: the teacher's, as configured.

    Raises:
        TeacherSelfTestError: the teacher's answers are of another temperature; names both.
    """
    lack, other_lack = (
        float((s.topk_logprobs[:, 0] - s.token_logprobs).max()) for s in (own, other)
    )
    found = temperature * other_lack / lack if lack else math.nan
    if not math.isclose(found, expected, rel_tol=TEMPERATURE):
        raise TeacherSelfTestError(
            f"teacher {own.teacher}: it scores at temperature {found:.4g} where {expected:g} "
            f"is configured (a token is {lack:.4g} nats below the first candidate, and "
            f"{other_lack:.4g} when asked for {temperature:g})"
        )


_EXPLANATIONS: Final = {
    "mass": "candidates must be sorted and distinct, and add up to one with the tail",
    "entropy": "it must lie between what candidates and tail leave open; is it taken at "
    "another temperature?",
    "alignment": "greedy tokens must be their own first candidates; are rows shifted?",
    "context": "the first token must move the second row and not the first; are rows shifted?",
    "repeat": "the same request must have the same answer",
    "replicas": "all replicas must say the same as replica 0; do they serve one model in "
    "one precision?",
}


def _failure(
    number: int,
    check: str,
    deviation: float,
    allowed: float,
    continuation: Int32Array,
    signal: TeacherSignal,
) -> str:
    said = np.round(signal.token_logprobs, 3).tolist()
    best = list(
        zip(
            signal.topk_ids[:, 0].tolist(),
            np.round(signal.topk_logprobs[:, 0], 3).tolist(),
            strict=True,
        )
    )
    return (
        f"teacher {signal.teacher}, replica {number}: {check} is off by {deviation:.4g}, "
        f"allowed is {allowed:g}: {_EXPLANATIONS[check]} (tokens {continuation.tolist()} "
        f"have log-probabilities {said}, first candidates are {best})"
    )


async def _continue(scorer: TeacherScorer, prompt_ids: Int32Array) -> Int32Array:
    """The teacher's own greedy continuation: the last row of a scored response is about what
    follows the rest of it, whatever its last token is.
    """
    continuation = prompt_ids[-1:]
    for _ in range(CONTINUATION_TOKENS):
        signal = await _score(scorer, 0, prompt_ids, continuation)
        continuation = np.insert(
            continuation,
            len(continuation) - 1,
            signal.topk_ids[-1, 0],
        )

    return continuation[:-1]


async def _score(
    scorer: TeacherScorer, number: int, prompt_ids: Int32Array, response_ids: Int32Array
) -> TeacherSignal:
    result = await scorer.score(_stored(prompt_ids, response_ids))
    if isinstance(result, LostTrajectory):
        raise TeacherSelfTestError(f"replica {number}: it does not answer: {result.detail}")

    return cast(ScoredTrajectory, result.body).signal


def _alignment_error(signal: TeacherSignal) -> float:
    """Returns how far a token is below the first candidate, at most."""
    return float(np.abs(signal.topk_logprobs[:, 0] - signal.token_logprobs).max())


def _mass_error(signal: TeacherSignal) -> float:
    """Returns how far a row is from probability one; infinite where candidates are unsorted or stand
    twice.
    """
    candidates = signal.topk_logprobs
    twice = [
        len(set(ids[kept])) < kept.sum()
        for ids, kept in zip(signal.topk_ids, candidates > -np.inf, strict=True)
    ]
    if np.any(candidates[:, 1:] > candidates[:, :-1]) or any(twice):
        return math.inf

    mass = np.exp(_outcomes(signal)).sum(axis=1)

    return float(np.abs(mass - 1.0).max())


def _entropy_error(signal: TeacherSignal, vocab_size: int) -> float:
    """Returns how far an entropy lies outside what candidates and tail leave: at least that of the
    outcomes, at most that with the tail spread evenly (and a merged end token in halves, where a
    slot is free).
    """
    outcomes = _outcomes(signal)
    known = outcomes > -np.inf
    lowest = -np.where(
        known,
        np.exp(outcomes) * np.where(known, outcomes, 0.0),
        0.0,
    ).sum(axis=1)
    num_known = known[:, :-1].sum(axis=1)
    highest = lowest + np.exp(outcomes[:, -1]) * np.log(np.maximum(vocab_size - num_known, 1))
    highest += math.log(2.0) * (num_known < known.shape[1] - 1)
    low, high = signal.entropy_low, signal.entropy_high

    return float(np.max([lowest - high, low - highest, low - high]))


def _context_error(signal: TeacherSignal, moved: TeacherSignal, same: float) -> float:
    """Returns how much another first token moves the row about itself; infinite where it does not
    move the next row.
    """
    rows = [
        np.abs(one[:2] - other[:2])
        for one, other in zip(_compared(signal), _compared(moved), strict=True)
    ]
    # the first token's own log-probability is of another token now
    still = max(row[0] for row in rows[1:])
    return float(still if max(row[1] for row in rows) > same else np.inf)


def _outcomes(signal: TeacherSignal) -> np.ndarray:
    """Candidates and tail, float64 [R, K + 1]."""
    return np.column_stack((signal.topk_logprobs, signal.tail_logprobs)).astype(np.float64)


def _difference(one: TeacherSignal, other: TeacherSignal) -> float:
    pairs = zip(_compared(one), _compared(other), strict=True)
    return float(max(np.abs(of_one - of_other).max() for of_one, of_other in pairs))


def _compared(signal: TeacherSignal) -> tuple[Float32Array, ...]:
    """Sampled tokens, first candidates, entropies: what rounding moves least."""
    return (
        signal.token_logprobs,
        signal.topk_logprobs[:, 0],
        signal.entropy_low,
        signal.entropy_high,
    )


def _stored(prompt_ids: Int32Array, response_ids: Int32Array) -> Stored[Trajectory]:
    """A response that was cut, so that no end token is mapped."""
    size = len(response_ids)
    prompt = PromptSample(
        epoch=0,
        prompt_id="self-test",
        source="self-test",
        token_ids=prompt_ids,
        reference_answer=None,
    )
    trajectory = Trajectory(
        prompt=prompt,
        sample_index=size,
        response_ids=response_ids,
        loss_mask=np.ones(size, np.bool_),
        rollout_logprobs=np.zeros(size, np.float32),
        policy_versions=np.zeros(size, np.int32),
        stop_reason=StopReason.LENGTH,
    )

    return Stored(Header.of(trajectory, {}), trajectory)
