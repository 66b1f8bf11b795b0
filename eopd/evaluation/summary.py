"""What a benchmark measured, prompt by prompt, as ``evaluations.jsonl`` keeps it. Pure.

Every metric is a mean over prompts of one number per prompt, so that two measurements of the same
prompts can be compared prompt by prompt.
"""

import math
from collections.abc import Mapping

from eopd.evaluation.benchmarks import BenchmarkResult, PromptResult
from eopd.evaluation.diversity import distinct_ratio
from eopd.evaluation.passk import mean_over_prompts, pass_at_k
from eopd.run.record import Measurement
from eopd.types import Estimate, StopReason

ByPrompt = Mapping[str, Mapping[str, float]]  # metric -> prompt id -> number


def by_prompt(result: BenchmarkResult, samples: int) -> ByPrompt:
    """Returns the numbers of every prompt by metric: ``avg_at_n``, ``pass_at_8`` for 8 samples,
    ``response_tokens``, ``truncation_rate``, ``distinct_1`` and ``distinct_2``.

    A prompt without any answer has a score, which is 0, and no length.
    """
    numbers: dict[str, dict[str, float]] = {}
    for prompt in result.prompts:
        for metric, value in _numbers(prompt, samples).items():
            if math.isfinite(value):
                numbers.setdefault(metric, {})[prompt.prompt_id] = value

    return numbers


def measurements(numbers: ByPrompt) -> dict[str, Measurement]:
    """Returns the mean over prompts of every metric, with its standard error."""
    return {
        metric: _measurement(mean_over_prompts(list(values.values())))
        for metric, values in numbers.items()
    }


def differences(numbers: ByPrompt, first: ByPrompt) -> dict[str, Measurement]:
    """Returns the mean over prompts of what every metric changed by since ``first``.

    Left out are metrics that were not measured on the same prompts then. The standard error is that
    of the prompts' own differences: what makes a prompt hard is in both measurements, and cancels.
    """
    changed: dict[str, dict[str, float]] = {}
    for metric, values in numbers.items():
        before = first.get(metric, {})
        if before.keys() == values.keys():
            changed[metric] = {name: value - before[name] for name, value in values.items()}

    return measurements(changed)


def _numbers(prompt: PromptResult, samples: int) -> dict[str, float]:
    scores = {"avg_at_n": pass_at_k(prompt.num_samples, prompt.num_correct, 1)}
    if samples > 1:
        scores[f"pass_at_{samples}"] = pass_at_k(samples, prompt.num_correct, samples)

    if not prompt.answers:
        return scores

    answers, count = prompt.answers, len(prompt.answers)
    responses = [answer.response_ids for answer in answers]
    truncated = sum(answer.stop_reason is StopReason.LENGTH for answer in answers)

    return {
        **scores,
        "response_tokens": sum(map(len, responses)) / count,
        "truncation_rate": truncated / count,
        "distinct_1": distinct_ratio(responses, 1),
        "distinct_2": distinct_ratio(responses, 2),
    }


def _measurement(estimate: Estimate) -> Measurement:
    """Returns an estimate as it is kept: one prompt shows no spread."""
    error = estimate.standard_error
    return Measurement(mean=estimate.mean, standard_error=error if math.isfinite(error) else None)
