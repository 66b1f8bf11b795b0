"""Histograms of entropies, and the divergences by part of the tokens."""

import math

import pytest
import torch

from eopd.learner.estimates import entropy_counts, eval_stats, token_sums
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


def test_divergences_are_told_apart_by_certainty_and_source():
    """Worked by hand: two responses of three tokens and one; the last of the first three is
    masked.
    """
    first = torch.zeros(6, 3)
    first[0] = torch.tensor([1.0, 3.0, 0.0])
    first[1] = torch.tensor([0.5, 2.0, 0.0])
    first[-1] = torch.tensor([1, 1, 0])
    second = torch.zeros(6, 1)
    second[0], second[1], second[-1] = 5.0, 4.0, 1.0
    sums = [
        token_sums(first, torch.tensor([0.0, 1.0, 1.0])),
        token_sums(second, torch.tensor([1.0])),
    ]
    counts = [[[0] * NUM_ENTROPY_BINS] * 2]
    parts = eval_stats(sums, ["lists", "stories"], counts).parts
    expected = {
        "teacher unsure": (2 / 3, 4.0, 3.0),
        "teacher sure": (1 / 3, 1.0, 0.5),
        "source lists": (2 / 3, 2.0, 1.25),
        "source stories": (1 / 3, 5.0, 4.0),
    }
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        share, reverse_kl, forward_kl = expected[name]
        assert part.share == pytest.approx(share)
        assert part.reverse_kl.mean == pytest.approx(reverse_kl)
        assert part.forward_kl.mean == pytest.approx(forward_kl)

    of_one_source = eval_stats(sums, ["lists", "lists"], counts).parts
    assert list(of_one_source) == ["teacher unsure", "teacher sure"]


def test_a_part_without_tokens_is_left_out():
    columns = torch.ones(6, 2)
    counts = [[[0] * NUM_ENTROPY_BINS] * 2]
    sums = [token_sums(columns, torch.tensor([0.0, math.nan]))] * 2
    assert list(eval_stats(sums, ["a", "a"], counts).parts) == ["teacher sure"]
