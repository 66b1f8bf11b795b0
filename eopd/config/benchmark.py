"""The benchmarks on which a student's own responses are graded, and the names of what is measured."""

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from eopd.config.base import (
    GraderName,
    Names,
    Positive,
    SamplingTemperature,
    Section,
    Tokens,
)
from eopd.config.prompts import COLUMNS_WORDS, PARTS_WORDS, Columns, Parts
from eopd.config.teacher import NAME, NAME_WORDS

HELD_OUT: Final = "held_out"  # the name of the held-out measurement among the benchmarks'
HELD_OUT_METRICS: Final = ("reverse_kl", "forward_kl", "top1_agreement")


def ks_of(samples: int) -> tuple[int, ...]:
    """Returns the k for which pass@k is reported: the powers of two below the number of samples, and
    that number.

    Example: 1, 2, 4 and 6 of 6 samples.
    """
    return (*(2**power for power in range((samples - 1).bit_length())), samples)


def _not_empty(texts: tuple[str, ...]) -> tuple[str, ...]:
    if "" in texts:
        raise ValueError("a text that ends a response has at least one character")

    return texts


class BenchmarkConfig(Section):
    """A set of prompts with answers: the student writes several responses to each, and a grader
    says which are right. The live engines write them, under the weights of one batch.
    """

    name: str = Field(pattern=NAME, max_length=100, description=NAME_WORDS)
    """The name of the benchmark in metrics, messages and files. ``held_out`` is taken."""

    data: Parts = Field(description=PARTS_WORDS)
    """The rows, in the same forms as ``prompts.held_out``: of several parts the prompts are taken in
    turn. Each row needs an ``answer``. They are rendered as the section ``prompts`` says.
    """

    columns: Columns | None = Field(None, description=f"{COLUMNS_WORDS}, or null")
    """The columns of all parts that have none of their own, in the place of ``prompts.columns``."""

    grader: GraderName = "exact"
    """How an answer is judged: ``exact`` compares text, ``math`` compares mathematics, and
    ``package.module:name`` is a function of your own (docs/extending.md).
    """

    samples: int = Field(1, ge=1, le=10_000)
    """The number n of responses to each prompt, which avg@n is of, and pass@k for k = 2, 4, 8 and
    so on below n, and n.
    """

    prompts: Positive | None = None
    """The number of prompts that are asked, the first ones. ``null`` asks all."""

    max_response_tokens: Tokens | None = None
    """The longest response, in tokens. ``null`` is that of ``evaluation.max_response_tokens``."""

    temperature: SamplingTemperature = 1.0
    """The temperature of the softmax from which responses are sampled."""

    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """The probability of the smallest set of tokens to sample from (nucleus sampling). 1 samples
    from all.
    """

    stop: Annotated[Names, AfterValidator(_not_empty)] = ()
    """The texts that end a response. What is graded ends before the first of them."""

    every: Positive | None = None
    """The number of batches between two measurements. ``null`` is that of ``evaluation.every``."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what is measured, without the number of lost responses."""
        passed = [f"pass_at_{k}" for k in ks_of(self.samples) if k > 1]
        lengths = ("response_tokens", "truncation_rate")
        return ("avg_at_n", *passed, *lengths, "distinct_1", "distinct_2")
