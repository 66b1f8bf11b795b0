"""What was measured, prompt by prompt, as ``evaluations.jsonl`` keeps it, and what it says of all
prompts. Pure.

    a benchmark        by_prompt ──▶ ByPrompt ──▶ measurements: means
    held-out prompts   learner   ──▶ ByPrompt ──▶ differences: paired with the first ByPrompt

Every metric is a mean over prompts of one number per prompt, so that two measurements of the same
prompts can be compared prompt by prompt. Prompts weigh the same in a benchmark, and by their tokens
where these are counted: a metric of held-out prompts is a mean per token (``EvalStats``).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from eopd.evaluation.benchmarks import BenchmarkResult, PromptResult
from eopd.evaluation.diversity import distinct_ratio
from eopd.evaluation.passk import change_over_prompts, mean_over_prompts, pass_at_k
from eopd.run.record import Measurement
from eopd.types import ByPrompt, StopReason

TOKENS: Final = "tokens"  # the weights of all metrics that end as it does
_OF_PART: Final = ": "  # between a metric and the part of the tokens that it is of


def by_prompt(result: BenchmarkResult, ks: Sequence[int]) -> ByPrompt:
    """Returns the numbers of every prompt by metric: ``avg_at_n``, ``pass_at_2`` and ``pass_at_4``
    for the k 2 and 4, ``response_tokens``, ``truncation_rate``, ``distinct_1`` and ``distinct_2``.

    A prompt without any answer has a score, which is 0, and no length.
    """
    numbers: dict[str, dict[str, float]] = {}
    for prompt in result.prompts:
        for metric, value in _numbers(prompt, ks).items():
            if math.isfinite(value):
                numbers.setdefault(metric, {})[prompt.prompt_id] = value

    return numbers


def measurements(numbers: ByPrompt) -> dict[str, Measurement]:
    """Returns the mean over prompts of every metric, with its standard error, and for each part of
    the tokens ``share: PART``, its share of all tokens.
    """
    found = {}
    for metric, values in numbers.items():
        if not _is_weight(metric):
            weights = _weights(numbers, metric, values)
            found[metric] = mean_over_prompts(list(values.values()), weights)
        elif metric != TOKENS:
            part = metric.removeprefix(TOKENS)
            share = math.fsum(values.values()) / math.fsum(numbers[TOKENS].values())
            found[f"share{part}"] = Measurement(mean=share)

    return found


def differences(numbers: ByPrompt, first: ByPrompt) -> dict[str, Measurement]:
    """Returns what the mean over prompts of every metric changed by since ``first``, with a standard
    error that is paired by prompt.

    Left out are metrics that were not measured on the same prompts then.
    """
    found = {}
    for metric, values in numbers.items():
        before = first.get(metric, {})
        if _is_weight(metric) or before.keys() != values.keys():
            continue

        found[metric] = change_over_prompts(
            list(values.values()),
            [before[prompt] for prompt in values],
            _weights(numbers, metric, values),
            _weights(first, metric, values),
        )

    return found


def _is_weight(metric: str) -> bool:
    return metric.partition(_OF_PART)[0] == TOKENS


def _weights(numbers: ByPrompt, metric: str, prompts: Iterable[str]) -> Sequence[float]:
    """Returns the weights of a metric's prompts; none where they weigh the same."""
    _, colon, part = metric.partition(_OF_PART)
    tokens = numbers.get(f"{TOKENS}{colon}{part}", {})
    return [tokens[prompt] for prompt in prompts] if tokens else ()


def _numbers(prompt: PromptResult, ks: Sequence[int]) -> dict[str, float]:
    samples, right = prompt.num_samples, prompt.num_correct
    scores = {"avg_at_n": pass_at_k(samples, right, 1)}
    scores |= {f"pass_at_{k}": pass_at_k(samples, right, k) for k in ks}
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
