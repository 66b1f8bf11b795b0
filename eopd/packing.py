"""Headers to balanced micro-batches: trajectories are dealt to optimiser steps, ranks and token
budgets; bodies are never touched.

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
    """Relative learner cost of one trajectory."""
    tokens = header.num_tokens
    return tokens * (1.0 + tokens / QUADRATIC_TOKENS)


def pack(
    batch: Sequence[Scored], *, steps: int, ranks: int, token_budget: int, alpha: float
) -> PackedBatch:
    """Cut a batch: optimiser steps in the order given, ranks balanced by cost, micro-batches below
    the token budget.

    Every rank gets the same number of micro-batches in a step; a short rank gets empty ones.

    Raises:
        ValueError: a trajectory is longer than the budget.
    """
    cuts = [len(batch) * step // steps for step in range(steps + 1)]
    parts = (batch[start:end] for start, end in pairwise(cuts))
    return PackedBatch(
        steps=tuple(_pack_step(part, ranks, token_budget) for part in parts), alpha=alpha
    )


def _pack_step(part: Sequence[Scored], ranks: int, token_budget: int) -> OptimizerStep:
    shares: list[list[Scored]] = [[] for _ in range(ranks)]
    costs = [0.0] * ranks

    for stored in sorted(part, key=lambda s: estimated_cost(s.header), reverse=True):
        lightest = costs.index(min(costs))
        shares[lightest].append(stored)
        costs[lightest] += estimated_cost(stored.header)

    micro = [_first_fit(share, token_budget) for share in shares]
    longest = max(len(m) for m in micro)
    even = tuple(tuple(m + [()] * (longest - len(m))) for m in micro)

    return OptimizerStep(num_loss_tokens=sum(s.header.num_loss_tokens for s in part), ranks=even)


def _first_fit(share: Sequence[Scored], token_budget: int) -> list[MicroBatch]:
    """First-fit-decreasing bins of at most ``token_budget`` tokens; ``share`` comes longest
    first.
    """
    bins: list[list[Scored]] = []
    # of bins that can still take the shortest: else each trajectory would look at all bins
    room: dict[int, int] = {}
    shortest = min((stored.header.num_tokens for stored in share), default=0)

    for stored in share:
        tokens = stored.header.num_tokens
        if tokens > token_budget:
            raise ValueError(
                f"trajectory {stored.header.key} has {tokens} tokens, "
                f"token_budget is {token_budget}"
            )

        fits = next((i for i, free in room.items() if free >= tokens), len(bins))
        if fits == len(bins):
            bins.append([])
            room[fits] = token_budget

        bins[fits].append(stored)
        room[fits] -= tokens
        if room[fits] < shortest:
            del room[fits]

    return [tuple(b) for b in bins]
