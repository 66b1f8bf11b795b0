"""The driver's view of the wire: brings every engine to a version, in two phases, whoever dies on the way.

sender (learner ranks)                       engines (generation goes on)
  open ──────────── InitInfo ──────────────▶ connect_weights          whenever the set of engines has changed
  send ──────────── buckets ───────────────▶ receive_weights          phase one: into host memory
                                             install_weights          phase two: pause, load, label, resume
                                             version                  asked back from every engine

A transfer that fails in phase one is given up, and nothing is lost: whoever does not answer is condemned, the group is
built again of those alive, and the version is sent again. An engine that fails in phase two may hold half of the
weights, so it is condemned. A condemned engine's replacement comes in through ``join``. A publish without any engine
is done at once: whoever joins later is brought to the learner's version.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from eopd.roles import EngineDownError, LearnerDownError
from eopd.types import PolicyVersion, PublishStats

PING_S = 10.0  # an engine that does not say its version within this is condemned
MAX_ROUNDS = 5  # of one publish; every failed one costs a time-out


class WeightSyncError(RuntimeError):
    """The weights cannot be brought to the engines, though everybody is alive; names the last cause."""


class SenderLink(Protocol):
    """The learner gang's ``WeightSender``, seen from the driver."""

    def reserved(self) -> AbstractAsyncContextManager[object]: ...  # noqa: D102 - no update comes between its calls
    async def version(self) -> PolicyVersion: ...  # noqa: D102
    async def open(self, engine_workers: Sequence[int]) -> Sequence[Mapping[str, object]]: ...  # noqa: D102
    async def accept(self) -> None: ...  # noqa: D102
    async def send(self) -> int: ...  # noqa: D102


class EngineLink(Protocol):
    """A rollout engine's weight calls, seen from the driver (``rollout/engine.py``)."""

    async def connect_weights(self, init_info: Mapping[str, object]) -> None: ...  # noqa: D102
    async def receive_weights(self) -> None: ...  # noqa: D102
    async def install_weights(self, version: PolicyVersion) -> float: ...  # noqa: D102
    async def version(self) -> PolicyVersion: ...  # noqa: D102


class BroadcastChannel:
    """A ``WeightChannel``: one sender, any number of engines.

    Args:
        sender: the learner gang.
        engines: by number.
        workers_per_engine: each takes part in the transfer.
        condemn: told the number of an engine that is of no use, and why.
        timeout_s: of each phase, as long as the wire's own and a little longer.
    """

    def __init__(
        self,
        sender: SenderLink,
        engines: Mapping[int, EngineLink],
        *,
        workers_per_engine: int,
        condemn: Callable[[int, str], None],
        timeout_s: float,
    ) -> None:
        self._sender = sender
        self._engines = dict(engines)
        self._workers = workers_per_engine
        self._condemn = condemn
        self._timeout_s = timeout_s
        self._connected = False
        self._lock = asyncio.Lock()
        self.num_failures = 0

    async def publish(self, version: PolicyVersion) -> PublishStats:
        """Bring every engine to ``version``, which the learner holds.

        Raises:
            WeightSyncError: ``MAX_ROUNDS`` transfers failed, or the learner holds another version.
            LearnerDownError: the sender is lost.
        """
        async with self._lock:
            stats = await self._bring_up_to_date()
        if stats.version != version:
            raise WeightSyncError(f"{version.label} was to be published, the learner holds {stats.version.label}")
        return stats

    async def join(self, number: int, engine: EngineLink) -> None:
        """Take in an engine that has just started, and bring it (and all others) to the learner's version.

        Raises:
            EngineDownError: it was lost on the way.
        """
        async with self._lock:
            self._engines[number], self._connected = engine, False
            await self._bring_up_to_date(newcomer=number)
        if number not in self._engines:
            raise EngineDownError(f"rollout engine {number} did not take the weights")

    def leave(self, number: int) -> None:
        """Leave out an engine that is gone."""
        if self._engines.pop(number, None) is not None:
            self._connected = False

    def disconnect(self) -> None:
        """Build the group again before the next transfer: there is another sender."""
        self._connected = False

    async def _bring_up_to_date(self, newcomer: int | None = None) -> PublishStats:
        started, cause = time.monotonic(), ""
        async with self._sender.reserved():
            version = await self._sender.version()
            for _ in range(MAX_ROUNDS):
                if not self._engines:
                    return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)
                sent = await self._transfer_or_repair(newcomer)
                if isinstance(sent, int):
                    transfer_s = time.monotonic() - started
                    pause_s = await self._install(version, newcomer)
                    return PublishStats(version=version, transfer_s=transfer_s, pause_s=pause_s, num_bytes=sent)
                cause = sent
        raise WeightSyncError(f"{MAX_ROUNDS} transfers of {version.label} failed, last: {cause}")

    async def _transfer_or_repair(self, newcomer: int | None) -> int | str:
        """Bytes sent; or why not, once the dead are condemned and the group is to be built again."""
        try:
            return await self._transfer()
        except LearnerDownError:
            raise
        except (RuntimeError, TimeoutError, OSError) as error:
            cause = str(error) or type(error).__name__
        self.num_failures += 1
        self._connected = False
        await self._drop_the_dead(cause, newcomer)
        return cause

    async def _transfer(self) -> int:
        """Phase one; connects first where the set of engines is a new one. Returns the bytes sent."""
        if not self._connected:
            infos = await self._sender.open([self._workers] * len(self._engines))
            joins = (engine.connect_weights(info) for engine, info in zip(self._engines.values(), infos, strict=True))
            await self._together(self._sender.accept(), *joins)
            self._connected = True
        await self._together(*(engine.receive_weights() for engine in self._engines.values()))
        async with asyncio.timeout(self._timeout_s):
            return await self._sender.send()

    async def _together(self, *calls: Awaitable[object]) -> None:
        """Await all, also after a failure: a call that is still under way would meet the next round's."""
        async with asyncio.timeout(self._timeout_s):
            results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, LearnerDownError)):
            raise error

    async def _install(self, version: PolicyVersion, newcomer: int | None) -> float:
        """Phase two, and the proof of it. Returns the longest pause in seconds."""

        async def one(engine: EngineLink) -> float:
            async with asyncio.timeout(self._timeout_s):
                pause_s = await engine.install_weights(version)
                if (serves := await engine.version()) != version:
                    raise RuntimeError(f"it serves {serves.label} after {version.label} was installed")
                return pause_s

        engines = dict(self._engines)
        results = await asyncio.gather(*(one(engine) for engine in engines.values()), return_exceptions=True)
        pauses = [0.0]
        for number, result in zip(engines, results, strict=True):
            if isinstance(result, BaseException):
                self.num_failures += 1
                self._drop(number, f"installing weights failed: {result or type(result).__name__}", newcomer)
            else:
                pauses.append(result)
        return max(pauses)

    async def _drop_the_dead(self, cause: str, newcomer: int | None) -> None:
        """Condemn every engine that does not answer any more."""

        async def ping(engine: EngineLink) -> None:
            async with asyncio.timeout(PING_S):
                await engine.version()

        engines = dict(self._engines)
        results = await asyncio.gather(*(ping(engine) for engine in engines.values()), return_exceptions=True)
        for number, result in zip(engines, results, strict=True):
            if isinstance(result, BaseException):
                self._drop(number, f"a weight transfer failed ({cause}), and it does not answer", newcomer)

    def _drop(self, number: int, reason: str, newcomer: int | None) -> None:
        self.leave(number)
        if number != newcomer:  # whoever started that one is told by ``join``
            self._condemn(number, reason)
