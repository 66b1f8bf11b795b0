"""A watchdog notices that a run makes no progress. It is a background task, which ends with the run."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Never, TypeVar

from eopd.types import RunFailedError

POLL_S = 1.0

T = TypeVar("T")


class StallError(RunFailedError):
    """No step has finished for too long, and the config asks the run to end then. The message shows
    who waits for whom.
    """


class Watchdog:
    """A watchdog notices that no step finishes.

    Args:
        stall_after_s: seconds without a step.
        on_stall: ``report`` logs it once per ``stall_after_s``, ``end`` raises.
    """

    def __init__(self, stall_after_s: float, on_stall: Literal["report", "end"]) -> None:
        self._stall_after_s, self._on_stall = stall_after_s, on_stall
        self.step()

    def step(self) -> None:
        """Notes that a step has finished, or that another phase of the run has begun."""
        self._stepped_at = self._reported_at = time.monotonic()

    async def watch(self, status: Callable[[], list[str]], log: Callable[[str], None]) -> Never:
        """Looks for a finished step again and again.

        Args:
            status: returns who waits for whom, a line each.
            log: is called with the report of a stall.

        Raises:
            StallError: no step for ``stall_after_s``, and ``on_stall`` is ``end``.
        """
        while True:
            await asyncio.sleep(min(POLL_S, self._stall_after_s / 4))
            now = time.monotonic()
            if now - self._reported_at < self._stall_after_s:
                continue

            self._reported_at = now
            message = "\n  ".join(
                [f"no step has finished for {now - self._stepped_at:.0f} s:", *status()]
            )
            if self._on_stall == "end":
                raise StallError(f"{message}\n  run.on_stall is end")

            log(message)


async def with_background(
    work: Coroutine[object, object, T], *background: Coroutine[object, object, Never]
) -> T:
    """Awaits ``work`` while the ``background`` runs. If that raises first, ``work`` is cancelled; when
    ``work`` is done, the background is.
    """
    working = asyncio.create_task(work)
    others = [asyncio.create_task(coroutine) for coroutine in background]
    tasks: list[asyncio.Task[Any]] = [*others, working]

    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            if other.done():
                await other

        return await working
    finally:
        for task in tasks:
            task.cancel()

        await asyncio.gather(*tasks, return_exceptions=True)
