"""What the learner asks of whatever holds the student, its optimiser and its schedule.

    run ─▶ loss ─▶ accumulate, once a micro-batch ─▶ step ─▶ gradient norm

``deepspeed_backend.py`` is the one that runs are made with. Another one is another file: it
implements this, and is handed to ``LearnerRank``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from eopd.config import LearnerConfig
from eopd.learner.collate import Packed
from eopd.learner.student import Head, Student

T = TypeVar("T")


class Backend(Protocol):
    """A student that can be trained. All methods are collective: every rank calls them alike."""

    student: Student

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        ...

    def run(self, packed: Packed, use_head: Callable[[Tensor, Head], T]) -> T:
        """The student's forward pass, with or without gradient."""
        ...

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of a loss; ``last`` closes the optimiser step.
        A loss that is not finite must make the gradient so.
        """
        ...

    def step(self) -> float:
        """Clip and apply what was accumulated; return the norm of the gradient over all ranks
        before clipping. Where it is not finite nothing is applied, on any rank.
        """
        ...

    def save(self, directory: Path, state: dict[str, int]) -> None:
        """Write weights, optimiser, schedule, random state, and ``state``.

        Raises:
            OSError: the disk did not take it.
        """
        ...

    def load(self, directory: Path) -> dict[str, int]:
        """Continue from what ``save`` wrote; return ``state``.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
            ValueError: it cannot be loaded by so many ranks.
        """
        ...

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the Hugging Face model by its plain name, whole, adapters merged, one
        after the other in lockstep.
        """
        ...

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the adapters, likewise; none without LoRA."""
        ...

    def shape(self, parameter: Tensor) -> Sequence[int]:
        """The full shape of a parameter that may be sharded."""
        ...

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        """Parameters are whole within the block; it is given whether they are copies that are
        gone afterwards.
        """
        ...


class OpenBackend(Protocol):
    """Makes a backend."""

    def __call__(
        self, student: Student, config: LearnerConfig, *, dtype: str, total_steps: int
    ) -> Backend:
        """Take ``student`` over, to be trained for ``total_steps`` optimiser steps."""
        ...
