"""Every trajectory lands in exactly one micro-batch, below the budget, and ranks stay in step."""

from collections.abc import Sequence

import fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopd.packing import estimated_cost, pack_batch
from eopd.types import Stored


def stored(index: int, tokens: int) -> Stored:
    header = fakes.header(str(index), num_prompt=1, num_response=tokens - 1)
    return Stored(header, body=index)


def trajectories(rank: Sequence[Sequence[Stored]]) -> list[Stored]:
    """Those of all micro-batches of a rank."""
    return [stored for micro in rank for stored in micro]


@given(
    lengths=st.lists(st.integers(2, 100), min_size=6, max_size=40),
    steps=st.integers(1, 6),
    ranks=st.integers(1, 3),
)
def test_a_pack_is_a_partition_within_the_budget_and_in_step(lengths, steps, ranks):
    batch = [stored(i, n) for i, n in enumerate(lengths)]
    packed = pack_batch(batch, steps=steps, ranks=ranks, token_budget=100, alpha=0.5)
    assert len(packed.steps) == steps and packed.alpha == 0.5
    assert sorted(s.body for s in packed.stored()) == list(range(len(lengths)))
    assert sum(step.num_loss_tokens for step in packed.steps) == sum(n - 1 for n in lengths)

    def size(step):
        return sum(len(trajectories(rank)) for rank in step.ranks)

    sizes = [size(step) for step in packed.steps]
    assert max(sizes) - min(sizes) <= 1

    for step in packed.steps:
        assert len(step.ranks) == ranks
        assert len({len(rank) for rank in step.ranks}) == 1
        for micro in (m for rank in step.ranks for m in rank):
            assert sum(s.header.num_tokens for s in micro) <= 100

    shares = [packed.share(rank) for rank in range(ranks)]
    assert sorted(s.body for share in shares for s in share.stored()) == list(range(len(lengths)))
    assert all(
        a.num_loss_tokens == b.num_loss_tokens
        for s in shares
        for a, b in zip(s.steps, packed.steps, strict=True)
    )


def test_ranks_are_balanced_by_cost():
    packed = pack_batch(
        [stored(i, n) for i, n in enumerate([80, 40, 40, 20, 20, 10])],
        steps=1,
        ranks=2,
        token_budget=200,
        alpha=1,
    )

    def cost(rank):
        return sum(estimated_cost(stored.header) for stored in trajectories(rank))

    costs = [cost(rank) for rank in packed.steps[0].ranks]
    assert max(costs) / min(costs) < 1.15


def test_micro_batches_are_filled_first_fit_decreasing_up_to_the_budget():
    packed = pack_batch(
        [stored(i, n) for i, n in enumerate([60, 40, 50, 50])],
        steps=1,
        ranks=1,
        token_budget=100,
        alpha=1,
    )
    ((first, second),) = packed.steps[0].ranks
    assert [stored.header.num_tokens for stored in first] == [60, 40]
    assert [stored.header.num_tokens for stored in second] == [50, 50]


def test_a_long_trajectory_costs_more_than_short_ones():
    # By tokens alone the last one would join the long one: 8192 stand against 2 x 4096.
    batch = [stored(i, n) for i, n in enumerate([8192, 4096, 4096, 4096])]
    packed = pack_batch(batch, steps=1, ranks=2, token_budget=8192, alpha=1)
    lengths = [
        sorted(s.header.num_tokens for micro in rank for s in micro)
        for rank in packed.steps[0].ranks
    ]
    assert lengths == [[8192], [4096, 4096, 4096]]


def test_optimiser_steps_keep_the_order_of_the_batch():
    packed = pack_batch(
        [stored(i, 10) for i in range(6)], steps=3, ranks=1, token_budget=100, alpha=1
    )
    assert [sorted(s.body for micro in step.ranks[0] for s in micro) for step in packed.steps] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]


def test_a_trajectory_above_the_budget_is_loud():
    with pytest.raises(ValueError, match="has 101 tokens, token_budget is 100"):
        pack_batch([stored(0, 101)], steps=1, ranks=1, token_budget=100, alpha=1)
