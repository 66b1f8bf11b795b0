"""What the learner needs of a backend, which holds the student, its optimiser and its schedule.

    run ──▶ loss ──▶ accumulate, for each micro-batch ──▶ step ──▶ gradient norm

Runs use ``deepspeed_backend.py``. Another backend is another file, which implements this protocol
and is passed to ``LearnerRank``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from eopd.config import LearnerConfig
from eopd.learner.collate import Packed
from eopd.learner.student import Student
from eopd.loss.chunked import Head

T = TypeVar("T")


class Backend(Protocol):
    """A student that can be trained. All methods are collective: every rank calls them alike."""

    student: Student

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""

    def run(self, packed: Packed, use_head: Callable[[Tensor, Head], T]) -> T:
        """Run the student's forward pass, with or without gradient, and return what ``use_head``
        makes of hidden states and head.
        """

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of a summed loss; ``last`` closes the optimiser
        step. A loss that is not finite must make the gradient so.
        """

    def step(self, num_loss_tokens: int) -> float:
        """Divide what was accumulated by the loss tokens of all ranks, clip it and apply it; return
        the norm of the gradient over all ranks before clipping. Where it is not finite nothing is
        applied, on any rank.
        """

    def save(self, directory: Path, state: dict[str, int]) -> None:
        """Write weights, optimiser, schedule, random state, and ``state``.

        Raises:
            OSError: the disk did not take it.
        """

    def load(self, directory: Path) -> dict[str, int]:
        """Continue from what ``save`` wrote; return ``state``.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
            ValueError: it cannot be loaded by so many ranks.
        """

    def forget_moments(self) -> None:
        """Set the optimiser back to its beginning, with the weights and the schedule as they are."""

    def shape(self, parameter: Tensor) -> Sequence[int]:
        """Return the full shape of a parameter that may be sharded."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        """Make parameters whole within a block.

        The block's value is whether they are copies, which are gone afterwards.
        """


class OpenBackend(Protocol):
    """Makes a backend."""

    def __call__(
        self, student: Student, config: LearnerConfig, *, dtype: str, total_steps: int
    ) -> Backend:
        """Take ``student`` over, to be trained for ``total_steps`` optimiser steps."""
