"""The driver's view of the wire: brings every engine to a version, in two phases, whoever dies on the way.

sender (learner ranks)                       engines (generation goes on)
  open ──────────── InitInfo ──────────────▶ connect_weights          whenever the set of engines has changed
  send ──────────── buckets ───────────────▶ receive_weights          phase one: into host memory
                                             check_weights            all there, every hash right
                                             install_weights          phase two: pause, load, label, resume
                                             version                  asked back from every engine
  probe ─────── log-probabilities ─────────▶ probe                    now and then: does it compute with them?

A transfer that fails in phase one is given up, and nothing is lost: whoever does not answer is condemned, the group is
built again of those alive, and the version is sent again. A wrong hash or a wrong probe is first repaired by sending
again; an engine that is wrong twice is condemned. One that fails in phase two may hold half of the weights, so it is
condemned. A condemned engine's replacement comes in through ``join``. A publish without any engine is done at once:
whoever joins later is brought to the learner's version.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from eopd.roles import EngineDownError, LearnerDownError
from eopd.types import Float32Array, Int32Array, PolicyVersion, PublishStats, WeightTransferError
from eopd.weights.probe import Probe, ProbeError, compare_probe

T = TypeVar("T")

PROBE_S = 30.0  # a full engine may have no seat for the probe: then it is not compared this time
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
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102


class EngineLink(Protocol):
    """A rollout engine's weight calls, seen from the driver (``rollout/engine.py``)."""

    async def connect_weights(self, init_info: Mapping[str, object]) -> None: ...  # noqa: D102
    async def receive_weights(self) -> None: ...  # noqa: D102
    async def check_weights(self) -> None: ...  # noqa: D102
    async def install_weights(self, version: PolicyVersion) -> float: ...  # noqa: D102
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102
    async def version(self) -> PolicyVersion: ...  # noqa: D102


class BroadcastChannel:
    """A ``WeightChannel``: one sender, any number of engines.

    Args:
        sender: the learner gang.
        engines: by number.
        workers_per_engine: each takes part in the transfer.
        probe: what engines and learner are compared on.
        condemn: told the number of an engine that is of no use, and why.
        connect_timeout_s: until all have joined.
        timeout_s: of every other call to an engine. The sender keeps its own time, bucket by bucket.
    """

    def __init__(
        self,
        sender: SenderLink,
        engines: Mapping[int, EngineLink],
        *,
        workers_per_engine: int,
        probe: Probe,
        condemn: Callable[[int, str], None],
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._sender = sender
        self._engines = dict(engines)
        self._workers = workers_per_engine
        self._probe = probe
        self._condemn = condemn
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._connected = False
        self._lock = asyncio.Lock()
        self._num_published = 0
        self.num_failures = 0
        self._doing = ""

    def status(self) -> str:
        """What goes on, for people."""
        return f"{self._doing if self._lock.locked() else 'idle'}, {len(self._engines)} engines"

    async def publish(self, version: PolicyVersion) -> PublishStats:
        """Bring every engine to ``version``, which the learner holds.

        Raises:
            WeightSyncError: ``MAX_ROUNDS`` transfers failed, or the learner holds another version.
            LearnerDownError: the sender is lost.
        """
        async with self._lock:
            every = self._probe.every
            stats = await self._bring_up_to_date(verify=every > 0 and self._num_published % every == 0)
            self._num_published += 1
        if stats.version != version:
            raise WeightSyncError(f"{version.label} was to be published, the learner holds {stats.version.label}")
        return stats

    async def join(self, number: int, engine: EngineLink) -> None:
        """Take in an engine that has just started, and bring it (and all others) to the learner's version.

        Raises:
            EngineDownError: it was lost on the way.
            LearnerDownError: the sender was; the newcomer is left out again.
            WeightSyncError: as ``publish``, likewise.
        """
        async with self._lock:
            self._engines[number], self._connected = engine, False
            try:
                await self._bring_up_to_date(verify=self._probe.every > 0, newcomer=number)
            except BaseException:
                self.leave(number)
                raise
        if number not in self._engines:
            raise EngineDownError(f"rollout engine {number} did not take the weights")

    def leave(self, number: int) -> None:
        """Leave out an engine that is gone."""
        if self._engines.pop(number, None) is not None:
            self._connected = False

    async def part(self, number: int) -> None:
        """Leave out an engine that is well, once no transfer is under way with it."""
        async with self._lock:
            self.leave(number)

    def disconnect(self) -> None:
        """Build the group again before the next transfer: there is another sender."""
        self._connected = False

    async def _bring_up_to_date(self, *, verify: bool, newcomer: int | None = None) -> PublishStats:
        self._doing = "waiting for the learner"
        async with self._sender.reserved():
            sync = _Sync(await self._sender.version(), newcomer)
            for _ in range(MAX_ROUNDS):
                if not self._engines:
                    return PublishStats(version=sync.version, transfer_s=0.0, pause_s=0.0, num_bytes=0)
                num_bytes = await self._transfer_or_repair(sync)
                if num_bytes is None:
                    continue
                transfer_s = time.monotonic() - sync.started
                pause_s = await self._install(sync)
                if not verify or await self._verify(sync):
                    return PublishStats(
                        version=sync.version,
                        transfer_s=transfer_s,
                        pause_s=pause_s,
                        num_bytes=num_bytes,
                        probe_nats=max(sync.gaps, default=None),
                    )
        raise WeightSyncError(f"{MAX_ROUNDS} transfers of {sync.version.label} failed, last: {sync.cause}")

    async def _transfer_or_repair(self, sync: "_Sync") -> int | None:
        """Bytes sent; None once the dead are condemned and the group is to be built again."""
        try:
            return await self._transfer(sync)
        except (WeightTransferError, EngineDownError, TimeoutError, OSError) as error:
            sync.cause = str(error) or type(error).__name__
        self.num_failures += 1
        self._connected = False
        for number, answer in (await self._each(lambda engine: engine.version(), PING_S)).items():
            if isinstance(answer, BaseException):
                found = str(answer) or "it does not answer"
                self._drop(sync, number, f"{found} (after a weight transfer failed: {sync.cause})")
        return None

    async def _transfer(self, sync: "_Sync") -> int:
        """Phase one; connects first where the set of engines is a new one. Returns the bytes sent."""
        if not self._connected:
            self._doing = "building the group"
            members = dict(self._engines)  # one of them may leave meanwhile
            infos = await self._sender.open([self._workers] * len(members))
            joins = (engine.connect_weights(info) for engine, info in zip(members.values(), infos, strict=True))
            await _together(self._connect_timeout_s, self._sender.accept(), *joins)
            if self._engines != members:
                raise WeightTransferError("an engine left while the group was built")
            self._connected = True
        self._doing = "sending"
        await _together(self._timeout_s, *(engine.receive_weights() for engine in self._engines.values()))
        num_bytes = await self._sender.send()
        self._doing = "checking what arrived"
        checks = await self._each(lambda engine: engine.check_weights(), self._timeout_s)
        wrong = {number: answer for number, answer in checks.items() if isinstance(answer, BaseException)}
        for number, error in wrong.items():
            if isinstance(error, WeightTransferError):
                self._suspect(sync, number, f"it did not receive the weights: {error}")
        for error in wrong.values():
            raise error
        return num_bytes

    async def _install(self, sync: "_Sync") -> float:
        """Phase two, and the proof of it. Returns the longest pause in seconds."""

        async def install(engine: EngineLink) -> float:
            pause_s = await engine.install_weights(sync.version)
            if (serves := await engine.version()) != sync.version:
                raise RuntimeError(f"it serves {serves.label} after {sync.version.label} was installed")
            return pause_s

        self._doing = "installing"
        pauses = [0.0]
        for number, pause_s in (await self._each(install, self._timeout_s)).items():
            if isinstance(pause_s, BaseException):
                self.num_failures += 1
                self._drop(sync, number, f"installing weights failed: {pause_s or type(pause_s).__name__}")
            else:
                pauses.append(pause_s)
        return max(pauses)

    async def _verify(self, sync: "_Sync") -> bool:
        """Whether all engines are near the learner; False where one is to be sent the weights once more."""
        self._doing = "probing"
        token_ids = self._probe.token_ids
        expected = await self._sender.probe(token_ids)
        repair, sync.gaps = False, []
        for number, logprobs in (await self._each(lambda engine: engine.probe(token_ids), PROBE_S)).items():
            if isinstance(logprobs, TimeoutError):
                continue
            if isinstance(logprobs, BaseException):
                self._drop(sync, number, f"it did not answer the probe: {logprobs or type(logprobs).__name__}")
                continue
            try:
                sync.gaps.append(compare_probe(logprobs, expected, dtype=self._probe.dtype))
            except ProbeError as error:
                self.num_failures += 1
                repair = self._suspect(sync, number, str(error)) or repair
        return not repair

    async def _each(self, call: Callable[[EngineLink], Awaitable[T]], timeout_s: float) -> dict[int, T | BaseException]:
        """The same call to every engine, each with its own deadline; what came of it, by number."""

        async def one(engine: EngineLink) -> T:
            async with asyncio.timeout(timeout_s):
                return await call(engine)

        engines = dict(self._engines)
        answers = await asyncio.gather(*(one(engine) for engine in engines.values()), return_exceptions=True)
        return dict(zip(engines, answers, strict=True))

    def _suspect(self, sync: "_Sync", number: int, reason: str) -> bool:
        """Whether an engine with wrong weights gets them once more: it does the first time."""
        sync.cause = f"rollout engine {number}: {reason}"
        first = number not in sync.suspects
        sync.suspects.add(number)
        if not first:
            self._drop(sync, number, f"twice with the same weights: {reason}")
        return first

    def _drop(self, sync: "_Sync", number: int, reason: str) -> None:
        stayed = number in self._engines  # else it was taken out meanwhile, by whoever replaces or ends it
        self.leave(number)
        if stayed and number != sync.newcomer:  # whoever started that one is told by ``join``
            self._condemn(number, reason)


class _Sync:
    """One version on its way. ``newcomer`` joins with it, ``suspects`` had it wrong once, ``gaps`` (nats) are those of
    the last probe.
    """

    def __init__(self, version: PolicyVersion, newcomer: int | None) -> None:
        self.version, self.newcomer = version, newcomer
        self.started, self.cause, self.suspects = time.monotonic(), "", set[int]()
        self.gaps: list[float] = []


async def _together(timeout_s: float, *calls: Awaitable[object]) -> None:
    """Await all, also after a failure: a call that is still under way would meet the next round's."""
    async with asyncio.timeout(timeout_s):
        results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, LearnerDownError)):
        raise error
