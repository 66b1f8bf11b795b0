"""A batch is packed into balanced micro-batches: its trajectories are dealt to optimiser steps, then
to ranks, then to micro-batches below a token budget. Only headers are read.

Example: five trajectories of 60, 50, 40, 30 and 20 tokens, two ranks, a budget of 100. The longest
goes first. Each goes to the rank that has the least work so far, and there into the first
micro-batch with room for it. Rank 0 is short of one micro-batch, and gets an empty one.

    rank 0    [60 30]  [ ]
    rank 1    [50 40]  [20]

Left out: padding. Micro-batches are packed sequences, and their attention is block-diagonal through
position ids.
"""

from collections.abc import Sequence
from itertools import pairwise

from eopd.types import Header, MicroBatch, OptimizerStep, PackedBatch, ScoredTrajectory, Stored

Scored = Stored[ScoredTrajectory]

# Attention is quadratic in the sequence, everything else linear: at this many tokens both cost
# about the same.
QUADRATIC_TOKENS = 8192


def estimated_cost(header: Header) -> float:
    """Returns what one trajectory costs the learner, in tokens of a short trajectory."""
    tokens = header.num_tokens
    return tokens * (1.0 + tokens / QUADRATIC_TOKENS)


def pack_batch(
    batch: Sequence[Scored], *, steps: int, ranks: int, token_budget: int, alpha: float
) -> PackedBatch:
    """Cuts a batch: into optimiser steps in the order given, these into ranks of balanced cost, and
    these into micro-batches of at most ``token_budget`` tokens.

    Every rank gets the same number of micro-batches in a step; a short rank gets empty ones.

    Raises:
        ValueError: a trajectory is longer than the budget.
    """
    cuts = [len(batch) * step // steps for step in range(steps + 1)]
    packed = [_pack_step(batch[start:end], ranks, token_budget) for start, end in pairwise(cuts)]
    return PackedBatch(steps=tuple(packed), alpha=alpha)


def _pack_step(batch: Sequence[Scored], ranks: int, token_budget: int) -> OptimizerStep:
    shares: list[list[Scored]] = [[] for _ in range(ranks)]
    costs = [0.0] * ranks

    for stored in sorted(
        batch,
        key=lambda stored: estimated_cost(stored.header),
        reverse=True,
    ):
        lightest = costs.index(min(costs))
        shares[lightest].append(stored)
        costs[lightest] += estimated_cost(stored.header)

    micro_batches = [_first_fit(share, token_budget) for share in shares]
    most = max(map(len, micro_batches))
    even = tuple((*micros, *[()] * (most - len(micros))) for micros in micro_batches)
    num_loss_tokens = sum(stored.header.num_loss_tokens for stored in batch)

    return OptimizerStep(num_loss_tokens=num_loss_tokens, ranks=even)


def _first_fit(share: Sequence[Scored], token_budget: int) -> list[MicroBatch]:
    """First-fit-decreasing: fills bins of at most ``token_budget`` tokens from a share that is sorted
    by length, the longest first.
    """
    bins: list[list[Scored]] = []
    # The free tokens of bins that can still take the shortest trajectory. Without those that are
    # full the search stays short.
    room: dict[int, int] = {}
    shortest = min((stored.header.num_tokens for stored in share), default=0)

    for stored in share:
        tokens = stored.header.num_tokens
        if tokens > token_budget:
            raise ValueError(
                f"trajectory {stored.header.key} has {tokens} tokens, "
                f"token_budget is {token_budget}"
            )

        index = next((index for index, free in room.items() if free >= tokens), len(bins))
        if index == len(bins):
            bins.append([])
            room[index] = token_budget

        bins[index].append(stored)
        room[index] -= tokens
        if room[index] < shortest:
            del room[index]

    return list(map(tuple, bins))
