"""Prompts come in a seeded order with random access: issue number i is a pure function of the seed,
of the prompts, and of the weights of their parts.

Without weights there is one stream of all prompts. With weights every part is a stream of its own,
and the streams take turns: the k-th prompt of a part is due at (k + 1/2) / weight, and the one that
is due first comes first. So each part has its share of every batch, to within about one prompt, and
a part that is small for its weight begins again earlier than the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from eopd.types import PromptSample, Sampling


class PromptOrder:
    """A prompt order gives every issue number a prompt of an epoch, and the way to sample it.

    An epoch of a stream holds every (prompt, sample_index) of it once, in an order of its own; the
    samples of one prompt follow each other.

    Args:
        prompts: All prompts.
        samples_per_prompt: The samples of each.
        seed: Seeds the order.
        parts: The same prompts by part; read where there are ``turns``.
        turns: How many prompts of each part come until the turns begin again; None without weights.
    """

    def __init__(
        self,
        prompts: Sequence[PromptSample],
        *,
        samples_per_prompt: int,
        seed: int,
        parts: Sequence[Sequence[PromptSample]] = (),
        turns: Sequence[int] | None = None,
    ) -> None:
        self._samples = samples_per_prompt
        self._seed = seed
        self._turns = [1] if turns is None else turns
        self._cycle = cycle_of(self._turns)
        if turns is None:
            self._streams = [_Stream(prompts, seed)]
        else:
            self._streams = [_Stream(part, seed, number) for number, part in enumerate(parts)]

    def at(self, issue: int) -> tuple[PromptSample, int]:
        """Returns prompt and sample index of issue number ``issue``."""
        number, sample_index = divmod(issue, self._samples)
        cycle, turn = divmod(number, len(self._cycle))
        part, before = self._cycle[turn]

        return self._streams[part].at(cycle * self._turns[part] + before), sample_index

    def sampling(
        self, issue: int, *, temperature: float, max_tokens: int, attempt: int = 0
    ) -> Sampling:
        """Returns how to sample an attempt of an issue: with a seed of its own, the same in every run
        of this order's seed. Its priority is the issue number: of two requests the lower one goes
        first.
        """
        seed = np.random.SeedSequence([self._seed, issue, attempt]).generate_state(1)[0]
        return Sampling(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=int(seed) & 0x7FFFFFFF,
            priority=issue,
        )


def cycle_of(turns: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the part whose turn it is, and its number of turns before, until all begin again.

    Example: for turns of 3 and 1 it is part 0, 0, 1, 0: part 0 is due at 1/6, 3/6 and 5/6, part 1
    at 1/2. Of parts that are due together the first one goes first.
    """
    due = [
        (Fraction(2 * number + 1, 2 * of_part), part, number)
        for part, of_part in enumerate(turns)
        for number in range(of_part)
    ]
    return [(part, number) for _, part, number in sorted(due)]


class _Stream:
    """A stream is prompts in epoch after epoch, each in an order of its own. ``name`` is the number
    of its part, where there are several streams.
    """

    def __init__(self, prompts: Sequence[PromptSample], seed: int, *name: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._name = name
        self._epoch = -1
        self._permutation: Sequence[int] = ()

    def at(self, number: int) -> PromptSample:
        """Returns a prompt by its number."""
        epoch, position = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch, *self._name])
            self._epoch = epoch
            self._permutation = generator.permutation(len(self._prompts)).tolist()

        return replace(self._prompts[self._permutation[position]], epoch=epoch)
