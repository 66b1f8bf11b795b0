"""A watchdog that notices that a run does not get on, and how such tasks end with the run."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Never, TypeVar

from eopd.types import RunFailedError

POLL_S = 1.0

T = TypeVar("T")
Tell = Callable[[str], None]


class StallError(RunFailedError):
    """No step has finished for too long, and the run was told to end then; says who waits for
    whom.
    """


class Watchdog:
    """Notices that nothing gets on.

    Args:
        stall_after_s: seconds without a step.
        on_stall: ``report`` says so once per ``stall_after_s``, ``end`` raises.
        report: who waits for whom, a line each.
    """

    def __init__(
        self,
        stall_after_s: float,
        on_stall: Literal["report", "end"],
        report: Callable[[], list[str]],
    ) -> None:
        self._stall_after_s, self._on_stall, self._report = stall_after_s, on_stall, report
        self._stepped = self._told = time.monotonic()

    def step(self) -> None:
        """A step has finished, or another phase of the run has begun."""
        self._stepped = self._told = time.monotonic()

    async def watch(self, tell: Tell) -> Never:
        """Look again and again.

        Raises:
            StallError: no step for ``stall_after_s``, and ``on_stall`` is ``end``.
        """
        while True:
            await asyncio.sleep(min(POLL_S, self._stall_after_s / 4))
            now = time.monotonic()
            if now - self._told < self._stall_after_s:
                continue

            self._told = now
            message = "\n  ".join(
                [f"no step has finished for {now - self._stepped:.0f} s:", *self._report()]
            )
            if self._on_stall == "end":
                raise StallError(f"{message}\n  run.on_stall is end")

            tell(message)


async def with_beside(
    work: Coroutine[object, object, T], *beside: Coroutine[object, object, Never]
) -> T:
    """Await ``work``, unless something that goes on ``beside`` it raises first: then all of
    these are cancelled.
    """
    working = asyncio.create_task(work)
    others = [asyncio.create_task(one) for one in beside]
    ends: list[asyncio.Future[Any]] = [*others, working]

    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for ended in others:
            if ended.done():
                await ended

        return await working
    finally:
        for task in ends:
            task.cancel()

        await asyncio.gather(*ends, return_exceptions=True)
