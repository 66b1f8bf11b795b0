"""A measurement: histograms of entropies, and the numbers of every prompt, by part of the tokens."""

import math

import torch

from eopd.learner.measuring import entropy_counts, eval_stats, token_sums
from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS


def test_entropies_are_counted_by_bin():
    columns = torch.zeros(6, 5)
    # the student's
    columns[2] = torch.tensor([0.0, math.nan, 1.5 * ENTROPY_BIN_NATS, math.inf, 0.0])
    columns[3] = 100.0 * ENTROPY_BIN_NATS * NUM_ENTROPY_BINS
    columns[-1] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    student, teacher = entropy_counts(columns)
    assert student == [1, 1, *[0] * (NUM_ENTROPY_BINS - 3), 1]
    assert teacher == [*[0] * (NUM_ENTROPY_BINS - 1), 4]


COUNTS = [[[0] * NUM_ENTROPY_BINS] * 2] * 2


def two_responses():
    """Two responses of three tokens and one; the last of the first three is masked."""
    first = torch.zeros(6, 3)
    first[0] = torch.tensor([1.0, 3.0, 0.0])
    first[1] = torch.tensor([0.5, 2.0, 0.0])
    first[4] = torch.tensor([1.0, 0.0, 0.0])
    first[-1] = torch.tensor([1, 1, 0])
    second = torch.zeros(6, 1)
    second[0], second[1], second[-1] = 5.0, 4.0, 1.0
    return [
        token_sums(first, torch.tensor([0.0, 1.0, 1.0])),
        token_sums(second, torch.tensor([1.0])),
    ]


def test_a_prompt_whose_numbers_are_not_finite_is_dropped():
    first, second = two_responses()
    first[0] = math.nan
    counts = [[[rank, *[0] * (NUM_ENTROPY_BINS - 1)]] * 2 for rank in (3, 1)]
    found = eval_stats([first, second], [("p", "lists"), ("q", "stories")], counts)
    assert (found.num_prompts, found.num_dropped) == (1, 1)
    assert found.student_entropy_counts == (1, *[0] * (NUM_ENTROPY_BINS - 1))
    assert found.by_prompt["reverse_kl"] == {"q": 5.0}
    assert not any("lists" in metric for metric in found.by_prompt)

    second[3] = math.inf
    nothing = eval_stats([first, second], [("p", "lists"), ("q", "stories")], COUNTS)
    assert (nothing.num_prompts, nothing.num_dropped) == (0, 2)


def test_every_prompt_has_its_means_by_certainty_and_source():
    """Worked by hand."""
    sums = two_responses()
    found = eval_stats(sums, [("p", "lists"), ("q", "stories")], COUNTS)
    assert found.num_prompts == 2
    assert found.by_prompt == {
        "reverse_kl": {"p": 2.0, "q": 5.0},
        "forward_kl": {"p": 1.25, "q": 4.0},
        "student_entropy": {"p": 0.0, "q": 0.0},
        "teacher_entropy": {"p": 0.0, "q": 0.0},
        "top1_agreement": {"p": 0.5, "q": 0.0},
        "tokens": {"p": 2.0, "q": 1.0},
        "reverse_kl: teacher unsure": {"p": 3.0, "q": 5.0},
        "forward_kl: teacher unsure": {"p": 2.0, "q": 4.0},
        "tokens: teacher unsure": {"p": 1.0, "q": 1.0},
        "reverse_kl: teacher sure": {"p": 1.0, "q": 0.0},
        "forward_kl: teacher sure": {"p": 0.5, "q": 0.0},
        "tokens: teacher sure": {"p": 1.0, "q": 0.0},
        "reverse_kl: source lists": {"p": 2.0},
        "forward_kl: source lists": {"p": 1.25},
        "tokens: source lists": {"p": 2.0},
        "reverse_kl: source stories": {"q": 5.0},
        "forward_kl: source stories": {"q": 4.0},
        "tokens: source stories": {"q": 1.0},
    }

    one_source = eval_stats(sums, [("p", "lists"), ("q", "lists")], COUNTS).by_prompt
    assert not any("source" in metric for metric in one_source)


def test_several_responses_to_a_prompt_are_added_up_in_any_order():
    sums = [*two_responses(), [6.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]]
    prompts = [("p", "s"), ("q", "s"), ("p", "s")]
    counts = [*COUNTS, [[1] * NUM_ENTROPY_BINS, [2] * NUM_ENTROPY_BINS]]
    found = eval_stats(sums, prompts, counts)
    assert found.by_prompt["reverse_kl"] == {"p": 2.5, "q": 5.0}
    assert found.by_prompt["tokens"] == {"p": 4.0, "q": 1.0}
    turned = (values[1:] + values[:1] for values in (sums, prompts, counts))
    other = eval_stats(*turned)
    assert other == found
    assert list(other.by_prompt["tokens"]) == ["p", "q"]


def test_a_part_without_tokens_is_left_out():
    sums = [token_sums(torch.ones(6, 2), torch.tensor([0.0, math.nan]))] * 2
    found = eval_stats(sums, [("p", "a"), ("q", "a")], COUNTS).by_prompt
    parts = {metric.partition(": ")[2] for metric in found if ": " in metric}
    assert parts == {"teacher sure"}
