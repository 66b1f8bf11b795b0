"""Histograms of entropies, and the divergences by part of the tokens."""

import math

import pytest
import torch

from eopd.learner.estimates import entropy_counts, eval_stats, token_sums
from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS


def test_entropies_are_counted_by_bin_and_what_is_no_number_is_left_out():
    columns = torch.zeros(6, 5)
    # the student's
    columns[2] = torch.tensor([0.0, math.nan, 1.5 * ENTROPY_BIN_NATS, math.inf, 0.0])
    columns[3] = 100.0 * ENTROPY_BIN_NATS * NUM_ENTROPY_BINS
    columns[-1] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    student, teacher = entropy_counts(columns)
    assert student == [1, 1, *[0] * (NUM_ENTROPY_BINS - 3), 1]
    assert teacher == [*[0] * (NUM_ENTROPY_BINS - 1), 4]


def test_divergences_are_told_apart_where_the_teacher_is_sure_and_by_source():
    """Worked by hand: two responses of three tokens and one; the last of the first three is
    masked.
    """
    first = torch.zeros(6, 3)
    first[0], first[1], first[-1] = (
        torch.tensor([1.0, 3.0, 0.0]),
        torch.tensor([0.5, 2.0, 0.0]),
        torch.tensor([1, 1, 0]),
    )
    second = torch.zeros(6, 1)
    second[0], second[1], second[-1] = 5.0, 4.0, 1.0
    gates = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0])
    sums = [token_sums(columns, gate) for columns, gate in zip((first, second), gates, strict=True)]
    counts = [[[0] * NUM_ENTROPY_BINS] * 2]
    parts = eval_stats(sums, ["lists", "stories"], counts).parts
    told = {
        name: (part.share, part.reverse_kl.mean, part.forward_kl.mean)
        for name, part in parts.items()
    }
    assert told == {
        "teacher unsure": (pytest.approx(2 / 3), pytest.approx(4.0), pytest.approx(3.0)),
        "teacher sure": (pytest.approx(1 / 3), pytest.approx(1.0), pytest.approx(0.5)),
        "source lists": (pytest.approx(2 / 3), pytest.approx(2.0), pytest.approx(1.25)),
        "source stories": (pytest.approx(1 / 3), pytest.approx(5.0), pytest.approx(4.0)),
    }
    assert list(eval_stats(sums, ["lists", "lists"], counts).parts) == [
        "teacher unsure",
        "teacher sure",
    ]


def test_a_part_without_tokens_is_left_out_and_no_number_opens_no_gate():
    columns = torch.ones(6, 2)
    counts = [[[0] * NUM_ENTROPY_BINS] * 2]
    sums = [token_sums(columns, torch.tensor([0.0, math.nan]))] * 2
    assert list(eval_stats(sums, ["a", "a"], counts).parts) == ["teacher sure"]
