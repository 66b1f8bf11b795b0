"""Histograms of entropies."""

import math

import torch

from eopd.learner.estimates import entropy_counts
from eopd.types import ENTROPY_BIN_NATS, NUM_ENTROPY_BINS


def test_entropies_are_counted_by_bin_and_what_is_no_number_is_left_out():
    columns = torch.zeros(6, 5)
    columns[2] = torch.tensor([0.0, math.nan, 1.5 * ENTROPY_BIN_NATS, math.inf, 0.0])  # the student's
    columns[3] = 100.0 * ENTROPY_BIN_NATS * NUM_ENTROPY_BINS
    columns[-1] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    student, teacher = entropy_counts(columns)
    assert student == [1, 1, *[0] * (NUM_ENTROPY_BINS - 3), 1]
    assert teacher == [*[0] * (NUM_ENTROPY_BINS - 1), 4]
