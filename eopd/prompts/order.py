"""Which prompt comes when: a seeded, epoch-exact order with random access."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eopd.types import PromptSample, Sampling


class PromptOrder:
    """Which sample comes when: issue number -> prompt of an epoch, and how it is sampled.

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
        """Prompt and sample index of issue number ``issue``."""
        number, sample_index = divmod(issue, self._samples)
        epoch, position = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = (
                epoch,
                generator.permutation(len(self._prompts)).tolist(),
            )

        prompt = self._prompts[self._permutation[position]]

        return replace(prompt, epoch=epoch), sample_index

    def sampling(
        self, issue: int, *, temperature: float, max_tokens: int, attempt: int = 0
    ) -> Sampling:
        """A seed of its own for every issue and attempt, the same in every run with this
        seed; issues go in order.
        """
        seed = np.random.SeedSequence([self._seed, issue, attempt]).generate_state(1)[0]
        return Sampling(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=int(seed) & 0x7FFFFFFF,
            priority=issue,
        )
