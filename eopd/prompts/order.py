"""Prompts come in a seeded order with random access, in which an epoch holds every prompt once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eopd.types import PromptSample, Sampling


class PromptOrder:
    """A prompt order gives every issue number a prompt of an epoch, and the way to sample it.

    An epoch holds every (prompt, sample_index) once, in an order of its own; the samples of one
    prompt follow each other.
    """

    def __init__(
        self, prompts: Sequence[PromptSample], *, samples_per_prompt: int, seed: int
    ) -> None:
        self._prompts = prompts
        self._samples = samples_per_prompt
        self._seed = seed
        self._epoch = -1
        self._permutation: Sequence[int] = ()

    def at(self, issue: int) -> tuple[PromptSample, int]:
        """Returns prompt and sample index of issue number ``issue``."""
        number, sample_index = divmod(issue, self._samples)
        epoch, position = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch = epoch
            self._permutation = generator.permutation(len(self._prompts)).tolist()

        prompt = self._prompts[self._permutation[position]]

        return replace(prompt, epoch=epoch), sample_index

    def sampling(
        self, issue: int, *, temperature: float, max_tokens: int, attempt: int = 0
    ) -> Sampling:
        """Returns how to sample an attempt of an issue: with a seed of its own, the same in every run
        of this order's seed. The lower issue goes first.
        """
        seed = np.random.SeedSequence([self._seed, issue, attempt]).generate_state(1)[0]
        return Sampling(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=int(seed) & 0x7FFFFFFF,
            priority=issue,
        )
