"""Workers that can do the same, as one: who gets the work, and what happens when nobody answers.

Least loaded first, a deadline for every request, another one in the place of a worker that is lost. A replica is one of

    closed     takes work                              -> open after ``_BREAKER`` failures in a row
    open       takes none for a while                  -> half open
    half open  takes one request, on probation         -> closed when it is answered, replaced when it is not
    replaced   gone; another one is being started      -> closed

A ``WorkerDownError`` costs the replica at once. Left out: how often a request is tried, since it may be what kills.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from eopd.roles import WorkerDownError

W = TypeVar("W")
R = TypeVar("R")

_BREAKER = 3  # failures in a row that open it
_OPEN_S = 10.0  # and for how long
_POLL_S = 0.1  # how often a request without a replica looks again
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0, 60.0, 60.0)  # before each attempt to replace a replica


class ReplicaFailedError(RuntimeError):
    """One attempt failed, for no fault of the request as far as is known; says why."""


@dataclass(slots=True)
class _Replica(Generic[W]):
    worker: W
    in_flight: int = 0
    failures: int = 0  # in a row
    open_until: float = 0.0
    replaced: bool = False

    def takes_work(self, now: float) -> bool:
        if self.replaced:
            return False
        return self.failures < _BREAKER or (now >= self.open_until and self.in_flight == 0)


class Replicas(Generic[W]):
    """Workers of one kind.

    Args:
        name: of them all, for messages.
        workers: those that run.
        replace: starts a new worker in the place of number ``i``, which is gone or of no use for the reason given.
        timeout_s: an answer that takes longer is a failure of the replica.
    """

    def __init__(
        self,
        name: str,
        workers: Sequence[W],
        *,
        replace: Callable[[int, str], Awaitable[W]],
        timeout_s: float,
    ) -> None:
        self.name = name
        self.num_failures = self.num_replacements = 0
        self._replicas = [_Replica(worker) for worker in workers]
        self._replace = replace
        self._timeout_s = timeout_s
        self._replacing: set[asyncio.Task[None]] = set()
        self._ended: BaseException | None = None  # why a replica could not be replaced
        self._closed = False

    @property
    def num_up(self) -> int:
        """How many take work now."""
        return sum(replica.takes_work(time.monotonic()) for replica in self._replicas)

    @property
    def num_in_flight(self) -> int:
        """Requests that wait for an answer."""
        return sum(replica.in_flight for replica in self._replicas)

    async def attempt(self, work: Callable[[W], Awaitable[R]], tried: list[int]) -> R:
        """Do ``work`` on the least loaded replica that takes some, better on one that is not in ``tried``.

        Args:
            work: one request.
            tried: numbers of the replicas it was tried on; this one's is added.

        Raises:
            ReplicaFailedError: the replica did not answer; another attempt may succeed.
            WorkerDownError: no replica is left, and none could be started.
        """
        replica = await self._least_loaded(tried)
        tried.append(self._replicas.index(replica))
        on_probation = replica.failures >= _BREAKER
        replica.in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                done = await work(replica.worker)
        except (WorkerDownError, TimeoutError) as error:
            detail = str(error) or f"no answer within {self._timeout_s:g} s"
            self.num_failures += 1
            self._blame(replica, detail, hopeless=on_probation or isinstance(error, WorkerDownError))
            raise ReplicaFailedError(detail) from error
        finally:
            replica.in_flight -= 1
        replica.failures = 0
        return done

    def condemn(self, index: int, reason: str) -> None:
        """Replace number ``index``, which somebody else found to be of no use."""
        self._blame(self._replicas[index], reason, hopeless=True)

    async def close(self) -> None:
        """Stop replacing."""
        self._closed = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)

    async def _least_loaded(self, tried: Sequence[int]) -> _Replica[W]:
        while True:
            now = time.monotonic()
            free = [(i in tried, r.in_flight, i) for i, r in enumerate(self._replicas) if r.takes_work(now)]
            if free:
                return self._replicas[min(free)[-1]]
            if all(replica.replaced for replica in self._replicas) and not self._replacing:
                raise WorkerDownError(f"{self.name}: no replica is left") from self._ended
            await asyncio.sleep(_POLL_S)

    def _blame(self, replica: _Replica[W], reason: str, *, hopeless: bool) -> None:
        if replica.replaced:  # others were in flight on it too
            return
        replica.failures += 1
        replica.open_until = time.monotonic() + _OPEN_S
        if hopeless and not self._closed:
            replica.replaced = True
            task = asyncio.create_task(self._put_another_in_place_of(replica, reason))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _put_another_in_place_of(self, replica: _Replica[W], reason: str) -> None:
        index = self._replicas.index(replica)
        for pause in _PAUSES_S:
            await asyncio.sleep(pause)
            try:
                worker = await self._replace(index, reason)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from starting, it is tried again, then told
                self._ended, reason = error, f"it did not start: {error}"
                continue
            self._replicas[index] = _Replica(worker)
            self.num_replacements += 1
            return
