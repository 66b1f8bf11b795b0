"""What a benchmark found: lines for a person, or one object for a program."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from eopd.evaluation.benchmarks import BenchmarkResult, PromptResult
from eopd.evaluation.summary import by_prompt, measurements
from eopd.rewards.verdict import Verdict
from eopd.run.record import Measurement

VERDICT_WORDS: Final = {
    Verdict.CORRECT: "right",
    Verdict.WRONG: "wrong",
    Verdict.NO_ANSWER: "without an answer",
    Verdict.TIMEOUT: "timed out",
    Verdict.ERROR: "not graded",
}
IDS_SHOWN: Final = 5


def score_lines(result: BenchmarkResult, samples: int, ks: Sequence[int]) -> Sequence[str]:
    """Returns the scores, and the counts behind them, line by line."""
    found = measurements(by_prompt(result, ks))
    scores = {f"avg@{samples}": found["avg_at_n"]}
    scores |= {f"pass@{k}": found[f"pass_at_{k}"] for k in ks}
    width = max(map(len, scores))
    lines = [f"{name:<{width}}  {score.shown(digits=4)}" for name, score in scores.items()]

    lines.append(
        f"{len(result.prompts)} prompts, {_mean(found, 'response_tokens'):.1f} tokens an answer, "
        f"{_mean(found, 'truncation_rate'):.1%} truncated, {result.num_lost} lost"
    )
    counts = ", ".join(
        f"{number} {VERDICT_WORDS[verdict]}" for verdict, number in result.num_verdicts.items()
    )
    lines.append(f"{sum(result.num_verdicts.values())} answers: {counts}")

    if failed := _not_graded(result):
        more = f" and {len(failed) - IDS_SHOWN} more" if len(failed) > IDS_SHOWN else ""
        lines.append(
            f"not graded: prompts {', '.join(failed[:IDS_SHOWN])}{more}: the grader failed, "
            "or cannot read the accepted answer; these count as wrong"
        )

    return lines


def score_record(
    result: BenchmarkResult, samples: int, ks: Sequence[int], settings: Mapping[str, object]
) -> dict[str, object]:
    """Returns every number and the settings that it came from, for JSON. What cannot be said, such
    as the standard error of one prompt, is None.
    """
    found = measurements(by_prompt(result, ks))
    lengths = [answer.num_response_tokens for answer in result.answers]

    return {
        "prompts": len(result.prompts),
        "samples": samples,
        "avg_at_n": _estimate(found["avg_at_n"]),
        "pass_at_k": {str(k): _estimate(found[f"pass_at_{k}"]) for k in ks},
        "response_tokens": {
            "mean": _finite(_mean(found, "response_tokens")),
            "median": statistics.median(lengths) if lengths else None,
            "max": max(lengths, default=None),
        },
        "truncation_rate": _finite(_mean(found, "truncation_rate")),
        "lost": result.num_lost,
        "verdicts": {verdict.value: number for verdict, number in result.num_verdicts.items()},
        "not_graded": _not_graded(result),
        "settings": dict(settings),
    }


def _mean(found: Mapping[str, Measurement], metric: str) -> float:
    """Returns the mean of a metric; nan where no prompt has any answer."""
    return found[metric].mean if metric in found else math.nan


def _estimate(score: Measurement) -> dict[str, object]:
    """Returns a mean with its standard error and its 95 % interval, which stays within 0 and 1."""
    half, interval = score.half_width, None
    if half is not None:
        interval = [max(0.0, score.mean - half), min(1.0, score.mean + half)]

    return {
        "mean": score.mean,
        "standard_error": score.standard_error,
        "interval_95": interval,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _not_graded(result: BenchmarkResult) -> list[str]:
    """Returns the ids of the prompts with an answer on which the grader failed."""
    return [prompt.prompt_id for prompt in result.prompts if _failed(prompt)]


def _failed(prompt: PromptResult) -> bool:
    return any(answer.verdict is Verdict.ERROR for answer in prompt.answers)
