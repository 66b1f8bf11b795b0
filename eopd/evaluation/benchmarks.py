"""Runs a benchmark: n samples per prompt on every engine, graded, and summed up.

Samples are handed out in turn, all at once: each engine gets the same number (plus or minus one)
and batches them itself. A common queue would be more even in time, but an engine that fails fast
would empty it; this way a failing engine loses its own share. Grading runs beside generation, one
answer at a time. A lost trajectory is unanswered: it scores 0, is not sampled again, and is
reported.
"""

import asyncio
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from eopd.evaluation.passk import mean_over_prompts, pass_at_k
from eopd.rewards.verdict import Grader, Verdict
from eopd.roles import RolloutEngine
from eopd.types import (
    Estimate,
    Int32Array,
    LostTrajectory,
    PromptSample,
    Reference,
    Sampling,
    StopReason,
    Stored,
    Trajectory,
)

Decode = Callable[[Int32Array], str]  # response_ids [R] -> text without special tokens
Fetch = Callable[[Stored[Trajectory]], Awaitable[Trajectory | LostTrajectory]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A graded response: its text, which ends before a text that ended it, and its token ids."""

    sample_index: int
    response: str
    response_ids: tuple[int, ...] = field(repr=False)
    stop_reason: StopReason
    verdict: Verdict

    @property
    def num_response_tokens(self) -> int:
        """The length of the response, with the token that ended it."""
        return len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """All samples of a prompt: the answers, and those that were lost."""

    prompt_id: str
    source: str
    reference_answer: Reference
    answers: tuple[Answer, ...]
    lost: tuple[LostTrajectory, ...]

    @property
    def num_samples(self) -> int:
        """The number of samples that were asked for."""
        return len(self.answers) + len(self.lost)

    @property
    def num_correct(self) -> int:
        """The number of samples that are correct; a lost one is not."""
        return sum(answer.verdict is Verdict.CORRECT for answer in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Scores over all samples, with standard errors clustered by prompt, and lengths over the
    answers.

    ``truncation_rate`` is the share of answers cut at the length limit. Without any answer it is
    nan, and so is ``mean_response_tokens``.
    """

    avg_at_n: Estimate
    pass_at_k: Mapping[int, Estimate]
    mean_response_tokens: float
    truncation_rate: float
    num_lost: int
    num_verdicts: Mapping[Verdict, int]  # of the answered ones; every verdict is a key
    prompts: tuple[PromptResult, ...]

    def write_prompts(self, path: Path) -> None:
        """Write one prompt per line as JSON: its counts, each answer with text and verdict, each
        loss with its reason.
        """
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(_row(prompt), allow_nan=False) + "\n" for prompt in self.prompts
            )


async def run_benchmark(
    engines: Sequence[RolloutEngine],
    prompts: Sequence[PromptSample],
    decode: Decode,
    grader: Grader,
    *,
    fetch: Fetch,
    samples: int,
    sampling: Sampling,
    ks: Sequence[int],
) -> BenchmarkResult:
    """Sample every prompt ``samples`` times, grade the answers, and sum up.

    Args:
        engines: At least one.
        prompts: At least one, each with a reference answer.
        decode: Token ids to text.
        grader: Called from one thread, one answer at a time.
        fetch: Brings the body of a stored trajectory here.
        samples: n, samples per prompt.
        sampling: Of each sample, which gets a seed made from this one's, and a priority below 0.
        ks: The k of every pass@k wanted, each in 1..n.

    Raises:
        ValueError: engines or prompts are missing, a prompt has no reference answer, or a k is
            outside 1..n.
        ExceptionGroup: an engine, ``fetch``, ``decode`` or the grader raised; the rest is
            cancelled.
    """
    _check(engines, prompts, samples, ks)
    turns = itertools.cycle(engines)
    grade = asyncio.get_running_loop().run_in_executor
    priorities = itertools.count(-samples * len(prompts))  # all below 0, the first prompt's lowest

    with ThreadPoolExecutor(max_workers=1) as grading:

        async def sample(
            engine: RolloutEngine, prompt: PromptSample, index: int
        ) -> Answer | LostTrajectory:
            seed = sample_seed(sampling.seed, prompt.prompt_id, index)
            request = replace(sampling, seed=seed, priority=next(priorities))
            stored = await engine.generate(prompt, index, request)
            trajectory = stored if isinstance(stored, LostTrajectory) else await fetch(stored)
            if isinstance(trajectory, LostTrajectory):
                return trajectory

            response = before_stop(decode(trajectory.response_ids), sampling.stop)
            verdict = await grade(grading, grader, response, _reference(prompt))
            return _answer(trajectory, response, verdict)

        async with asyncio.TaskGroup() as group:
            rows = []
            for prompt in prompts:
                pending = [sample(next(turns), prompt, index) for index in range(samples)]
                rows.append(list(map(group.create_task, pending)))

    results = []
    for prompt, tasks in zip(prompts, rows, strict=True):
        results.append(_collect(prompt, [task.result() for task in tasks]))
    return _summarize(results, ks)


def _answer(trajectory: Trajectory, response: str, verdict: Verdict) -> Answer:
    return Answer(
        sample_index=trajectory.sample_index,
        response=response,
        response_ids=tuple(trajectory.response_ids.tolist()),
        stop_reason=trajectory.stop_reason,
        verdict=verdict,
    )


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first of the texts that end a response."""
    ends = [end for each in stop if (end := text.find(each)) >= 0]
    return text[: min(ends, default=len(text))]


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Returns the seed of a sample, in 0..2**63 - 1: a hash, which is the same on every engine, in
    every order of work, and in every run.
    """
    digest = hashlib.blake2b(f"{seed}/{sample_index}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _check(
    engines: Sequence[RolloutEngine],
    prompts: Sequence[PromptSample],
    samples: int,
    ks: Sequence[int],
) -> None:
    if not engines or not prompts:
        raise ValueError(
            f"a benchmark needs engines and prompts; it has {len(engines)} engines, "
            f"{len(prompts)} prompts"
        )

    if invalid := [k for k in ks if not 1 <= k <= samples]:
        raise ValueError(
            f"pass@k for k = {invalid}: must lie in 1..{samples}, the number of samples per prompt"
        )

    for prompt in prompts:
        _reference(prompt)


def _reference(prompt: PromptSample) -> Reference:
    if prompt.reference_answer is None:
        raise ValueError(f"prompt {prompt.prompt_id}: has no reference answer to grade against")

    return prompt.reference_answer


def _collect(prompt: PromptSample, outcomes: Sequence[Answer | LostTrajectory]) -> PromptResult:
    return PromptResult(
        prompt_id=prompt.prompt_id,
        source=prompt.source,
        reference_answer=_reference(prompt),
        answers=tuple(outcome for outcome in outcomes if isinstance(outcome, Answer)),
        lost=tuple(outcome for outcome in outcomes if isinstance(outcome, LostTrajectory)),
    )


def _summarize(prompts: Sequence[PromptResult], ks: Sequence[int]) -> BenchmarkResult:
    def passed(k: int) -> Estimate:
        return mean_over_prompts(
            [pass_at_k(prompt.num_samples, prompt.num_correct, k) for prompt in prompts]
        )

    answers = [answer for prompt in prompts for answer in prompt.answers]
    verdicts = Counter(answer.verdict for answer in answers)

    return BenchmarkResult(
        avg_at_n=passed(1),
        pass_at_k={k: passed(k) for k in ks},
        mean_response_tokens=_mean([answer.num_response_tokens for answer in answers]),
        truncation_rate=_mean([answer.stop_reason is StopReason.LENGTH for answer in answers]),
        num_lost=sum(len(prompt.lost) for prompt in prompts),
        num_verdicts={verdict: verdicts[verdict] for verdict in Verdict},
        prompts=tuple(prompts),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _row(prompt: PromptResult) -> dict[str, object]:
    return {
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "reference_answer": prompt.reference_answer,
        "num_samples": prompt.num_samples,
        "num_correct": prompt.num_correct,
        "answers": [
            {
                "sample_index": answer.sample_index,
                "response": answer.response,
                "num_response_tokens": answer.num_response_tokens,
                "stop_reason": answer.stop_reason,
                "verdict": answer.verdict,
            }
            for answer in prompt.answers
        ],
        "lost": [
            {"sample_index": lost.key.sample_index, "reason": lost.reason, "detail": lost.detail}
            for lost in prompt.lost
        ],
    }
