"""Keeps some of the responses that a run trains on, for people to look at (``eopd show``).

    pipeline ──take──▶ Responses ──a task──▶ fetch bodies ──▶ decode ──▶ responses.jsonl

The loop waits for none of it. One step is worked on at a time: while it is, another is passed over,
so that few bodies are held however slow the disk is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from eopd.config import Config
from eopd.evaluation.samples import response_record
from eopd.hub import model_directory
from eopd.run.directory import RunDirectory
from eopd.runtime.logs import logger
from eopd.runtime.supervisor import fetch
from eopd.tokenizer import load_tokenizer
from eopd.types import LostTrajectory, ScoredTrajectory, Stored


class Responses:
    """A context in which the loop runs. What is under way at its end is waited for; where the loop
    has failed, it is given up, since the run may go back to before that step.

    Args:
        config: the run's.
        directory: where they are written.
        texts: the text of every training prompt.
    """

    def __init__(self, config: Config, directory: RunDirectory, texts: Mapping[str, str]) -> None:
        self._kept = config.telemetry.responses
        self._model = config.student.model
        self._directory = directory
        self._texts = texts
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is None:
            return

        if kind is not None:
            self._task.cancel()

        await asyncio.gather(self._task, return_exceptions=True)

    def take(self, step: int, batch: Sequence[Stored[ScoredTrajectory]]) -> None:
        """Begins to keep the responses of a step, if it is one whose responses are kept."""
        if self._kept is None or step % self._kept.every:
            return

        if self._task is not None and not self._task.done():
            logger.warning("the responses of step %d are not kept: still at those before", step)
            return

        chosen = of_first_prompts(batch, self._kept.prompts)
        self._task = asyncio.create_task(self._keep(step, chosen))

    async def _keep(self, step: int, chosen: Sequence[Stored[ScoredTrajectory]]) -> None:
        """Writes the responses of a step. A failure is logged, and ends no run."""
        try:
            bodies = await asyncio.gather(*map(fetch, chosen))
            records = await asyncio.to_thread(self._records, chosen, bodies)
            self._directory.add_responses(step, records)
        except Exception:  # noqa: BLE001 - see above
            logger.warning("the responses of step %d were not kept", step, exc_info=True)

    def _records(
        self,
        chosen: Sequence[Stored[ScoredTrajectory]],
        bodies: Sequence[ScoredTrajectory | LostTrajectory],
    ) -> list[Mapping[str, object]]:
        tokenizer = load_tokenizer(model_directory(self._model))
        return [
            response_record(
                stored.header, body, self._texts[stored.header.key.prompt_id], tokenizer
            )
            for stored, body in zip(chosen, bodies, strict=True)
            if not isinstance(body, LostTrajectory)
        ]


def of_first_prompts(
    batch: Sequence[Stored[ScoredTrajectory]], num_prompts: int
) -> list[Stored[ScoredTrajectory]]:
    """Returns the trajectories of the first prompts of a batch; a prompt of another epoch is
    another one.
    """
    names = [(stored.header.key.epoch, stored.header.key.prompt_id) for stored in batch]
    chosen = list(dict.fromkeys(names))[:num_prompts]
    return [stored for stored, name in zip(batch, names, strict=True) if name in chosen]
