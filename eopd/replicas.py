"""Workers that can do the same, as one: who gets the work, and what happens when nobody answers.

Least loaded first, a deadline for every request, another one in the place of a worker that is lost. A replica is one of

    closed     takes work                              -> open after ``_BREAKER`` failures in a row
    open       takes none for a while                  -> half open
    half open  takes one request, on probation         -> closed when it is answered, replaced when it is not
    replaced   gone; another one is being started      -> closed
    draining   takes no more work                      -> gone, once it has done what it has

A ``WorkerDownError`` costs the replica at once. Replicas may come and go (``add``, ``drain``). Left out: how often a
request is tried, since it may be what kills.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
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
    started: dict[object, float] = field(default_factory=dict)  # when, of every request in flight; the oldest first
    failures: int = 0  # in a row
    open_until: float = 0.0
    replaced: bool = False
    draining: bool = False

    @property
    def in_flight(self) -> int:
        return len(self.started)

    def takes_work(self, now: float) -> bool:
        if self.replaced or self.draining:
            return False
        return self.failures < _BREAKER or (now >= self.open_until and not self.started)

    def status(self, now: float) -> str:
        if self.replaced:
            return "gone, another one is being started"
        waits = f"{self.in_flight} in flight" + "".join(
            f", the oldest for {now - since:.0f} s" for since in list(self.started.values())[:1]
        )
        return (
            waits if self.takes_work(now) else f"{waits}, takes no work ({'draining' if self.draining else 'failed'})"
        )


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
        self._replicas = {index: _Replica(worker) for index, worker in enumerate(workers)}
        self._replace = replace
        self._timeout_s = timeout_s
        self._replacing: dict[int, asyncio.Task[None]] = {}
        self._ended: BaseException | None = None  # why a replica could not be replaced
        self._closed = False

    @property
    def num_up(self) -> int:
        """How many take work now."""
        return sum(replica.takes_work(time.monotonic()) for replica in self._replicas.values())

    @property
    def in_flight(self) -> dict[int, int]:
        """Requests that wait for an answer, by the number of the replica."""
        return {index: replica.in_flight for index, replica in self._replicas.items()}

    async def attempt(self, work: Callable[[W], Awaitable[R]], tried: list[int]) -> R:
        """Do ``work`` on the least loaded replica that takes some, better on one that is not in ``tried``.

        Args:
            work: one request.
            tried: numbers of the replicas it was tried on; this one's is added.

        Raises:
            ReplicaFailedError: the replica did not answer; another attempt may succeed.
            WorkerDownError: no replica is left, and none could be started.
        """
        index, replica = await self._least_loaded(tried)
        tried.append(index)
        on_probation = replica.failures >= _BREAKER
        request = object()
        replica.started[request] = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                done = await work(replica.worker)
        except (WorkerDownError, TimeoutError) as error:
            detail = str(error) or f"no answer within {self._timeout_s:g} s"
            self.num_failures += 1
            self._blame(index, replica, detail, hopeless=on_probation or isinstance(error, WorkerDownError))
            raise ReplicaFailedError(detail) from error
        finally:
            del replica.started[request]
        replica.failures = 0
        return done

    def condemn(self, index: int, reason: str) -> None:
        """Replace number ``index``, which somebody else found to be of no use; nothing, if it is gone already."""
        if index in self._replicas:
            self._blame(index, self._replicas[index], reason, hopeless=True)

    def is_up(self, index: int) -> bool:
        """Whether number ``index`` takes work now."""
        return self._replicas[index].takes_work(time.monotonic())

    def add(self, index: int, worker: W) -> None:
        """Take in one more, under a number that is free."""
        self._replicas[index] = _Replica(worker)

    async def drain(self, index: int) -> None:
        """Give number ``index`` no more work; returns once it is done, or lost. It is nobody's from then on."""
        replica = self._replicas[index]
        replica.draining = True
        if index in self._replacing:  # nobody needs another one in its place
            self._replacing[index].cancel()
            await asyncio.gather(self._replacing[index], return_exceptions=True)
        while replica.started and not replica.replaced:
            await asyncio.sleep(_POLL_S)
        self._replicas.pop(index)

    def status(self) -> list[str]:
        """What each does now, for people."""
        now = time.monotonic()
        return [f"{self.name} {index}: {replica.status(now)}" for index, replica in self._replicas.items()]

    async def close(self) -> None:
        """Stop replacing."""
        self._closed = True
        tasks = list(self._replacing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _least_loaded(self, tried: Sequence[int]) -> tuple[int, _Replica[W]]:
        while True:
            now = time.monotonic()
            free = [(i in tried, r.in_flight, i) for i, r in self._replicas.items() if r.takes_work(now)]
            if free:
                index = min(free)[-1]
                return index, self._replicas[index]
            if all(replica.replaced for replica in self._replicas.values()) and not self._replacing:
                raise WorkerDownError(f"{self.name}: no replica is left") from self._ended
            await asyncio.sleep(_POLL_S)

    def _blame(self, index: int, replica: _Replica[W], reason: str, *, hopeless: bool) -> None:
        if replica.replaced:  # others were in flight on it too
            return
        replica.failures += 1
        replica.open_until = time.monotonic() + _OPEN_S
        if not hopeless or self._closed:
            return
        replica.replaced = True
        if not replica.draining:
            task = asyncio.create_task(self._put_another_in_place_of(index, reason))
            self._replacing[index] = task
            task.add_done_callback(lambda _: self._replacing.pop(index))

    async def _put_another_in_place_of(self, index: int, reason: str) -> None:
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
