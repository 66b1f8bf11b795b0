"""What goes on beside the loop, for as long as a run does: a watchdog, and the wish for more
or fewer engines.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Never, TypeVar

from eopd.fleet import Fleet
from eopd.roles import RolloutEngine
from eopd.run.directory import RunDirectory
from eopd.run.progress import first_line
from eopd.types import RunFailedError

POLL_S = 1.0
RETRY_S = 30.0  # after engines did not start

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


async def scale_on_request(
    directory: RunDirectory, fleet: Fleet[RolloutEngine], tell: Tell
) -> Never:
    """Bring the run to as many engines as ``eopd scale`` asks for, again and again."""
    while True:
        await asyncio.sleep(POLL_S)
        wanted = directory.engines_asked_for()
        if wanted is None or wanted == fleet.size:
            continue

        tell(f"from {fleet.size} rollout engines to {wanted}")

        try:
            await fleet.scale(wanted)
        except Exception as error:  # noqa: BLE001 - whatever keeps a newcomer from starting ends no run
            tell(
                f"{fleet.size} rollout engines, no more: {first_line(error)}; trying again "
                f"in {RETRY_S:.0f} s"
            )
            await asyncio.sleep(RETRY_S)
        else:
            tell(f"{wanted} rollout engines")


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
