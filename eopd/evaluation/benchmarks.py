"""Runs a benchmark: n samples per prompt, graded.

All samples are asked for at once, and those of the first prompts are written first. Grading runs
beside generation, one answer at a time. A lost trajectory is unanswered: it scores 0, is not sampled
again, and is reported.
"""

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from eopd.config import BenchmarkConfig, ConfigError
from eopd.rewards.verdict import Grader, Verdict
from eopd.roles import RolloutEngine
from eopd.types import (
    Int32Array,
    LostTrajectory,
    PromptSample,
    Reference,
    Sampling,
    StopReason,
    Stored,
    Trajectory,
    first_failure,
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
    """All samples of all prompts, and how many were lost and judged in which way."""

    prompts: tuple[PromptResult, ...]

    @property
    def answers(self) -> Sequence[Answer]:
        """The answers to all prompts."""
        return [answer for prompt in self.prompts for answer in prompt.answers]

    @property
    def num_lost(self) -> int:
        """The number of samples that were lost."""
        return sum(len(prompt.lost) for prompt in self.prompts)

    @property
    def num_verdicts(self) -> Mapping[Verdict, int]:
        """The number of answers by verdict; every verdict is a key."""
        found = Counter(answer.verdict for answer in self.answers)
        return {verdict: found[verdict] for verdict in Verdict}

    def write_prompts(self, path: Path) -> None:
        """Write one prompt per line as JSON: its counts, each answer with text and verdict, each
        loss with its reason.
        """
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(_row(prompt), allow_nan=False) + "\n" for prompt in self.prompts
            )


async def run_benchmark(
    engines: RolloutEngine,
    prompts: Sequence[PromptSample],
    decode: Decode,
    grader: Grader,
    benchmark: BenchmarkConfig,
    *,
    fetch: Fetch,
    seed: int,
    max_tokens: int,
) -> BenchmarkResult:
    """Sample every prompt ``benchmark.samples`` times, and grade the answers.

    Args:
        engines: What writes.
        prompts: At least one, each with a reference answer, as preflight requires.
        decode: Token ids to text.
        grader: Called from one thread, one answer at a time.
        benchmark: How many samples, and how they are drawn.
        fetch: Brings the body of a stored trajectory here.
        seed: Of the benchmark: every sample has a seed made from it, and a priority below 0.
        max_tokens: The longest response.

    Raises:
        RunFailedError: no engine is left.
        ConfigError: the grader's process cannot be started.
        ExceptionGroup: an engine, ``fetch``, ``decode`` or the grader raised another error; the rest
            is cancelled.
    """
    samples, sampling = benchmark.samples, _sampling(benchmark, seed, max_tokens)
    grade = asyncio.get_running_loop().run_in_executor
    priorities = itertools.count(-samples * len(prompts))  # all below 0, the first prompt's lowest

    grading = ThreadPoolExecutor(max_workers=1)

    async def sample(prompt: PromptSample, index: int) -> Answer | LostTrajectory:
        own = sample_seed(seed, prompt.prompt_id, index)
        request = replace(sampling, seed=own, priority=next(priorities))
        stored = await engines.generate(prompt, index, request)
        trajectory = stored if isinstance(stored, LostTrajectory) else await fetch(stored)
        if isinstance(trajectory, LostTrajectory):
            return trajectory

        response = before_stop(decode(trajectory.response_ids), benchmark.stop)
        reference = cast(Reference, prompt.reference_answer)
        verdict = await grade(grading, grader, response, reference)
        return _answer(trajectory, response, verdict)

    try:
        with first_failure(ConfigError):
            async with asyncio.TaskGroup() as group:
                asked = itertools.product(prompts, range(samples))
                tasks = [group.create_task(sample(prompt, index)) for prompt, index in asked]
    finally:  # the grader may be busy, which must not hold up the event loop
        await asyncio.to_thread(grading.shutdown, cancel_futures=True)

    rows = [tasks[first : first + samples] for first in range(0, len(tasks), samples)]
    return BenchmarkResult(prompts=tuple(map(_collect, prompts, rows)))


def _sampling(benchmark: BenchmarkConfig, seed: int, max_tokens: int) -> Sampling:
    return Sampling(
        temperature=benchmark.temperature,
        max_tokens=max_tokens,
        seed=seed,
        top_p=benchmark.top_p,
        stop=benchmark.stop,
    )


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


def _collect(
    prompt: PromptSample, tasks: Sequence[asyncio.Task[Answer | LostTrajectory]]
) -> PromptResult:
    outcomes = [task.result() for task in tasks]
    return PromptResult(
        prompt_id=prompt.prompt_id,
        source=prompt.source,
        reference_answer=cast(Reference, prompt.reference_answer),
        answers=tuple(outcome for outcome in outcomes if isinstance(outcome, Answer)),
        lost=tuple(outcome for outcome in outcomes if isinstance(outcome, LostTrajectory)),
    )


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
