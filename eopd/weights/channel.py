"""The driver's view of the wire: brings engines to the learner's version, in two phases, whoever
dies on the way.

sender (learner ranks)                       engines (generation goes on)
  open ──────────── InitInfo ──────────────▶ connect_weights          where the group is another one than last time
  send ──────────── buckets ───────────────▶ receive_weights          phase one: into host memory
                                             check_weights            all there, every hash right
                                             install_weights          phase two: pause, load, label, resume
                                             version                  asked back from every engine
  probe ─────── log-probabilities ─────────▶ probe                    now and then: does it compute with them?

``publish`` goes to all engines. ``join`` goes to newcomers alone, to as many as wait at a time: the
others serve the learner's version already, and are neither sent to nor paused.

    what fails                                       what becomes of it
    connecting, receiving, leaving in the middle     the engine that did it is suspected: the first time all is sent
        a wrong hash, a wrong probe                  again, the second time it is lost
    an answer                                        lost, if it does not answer a ping
    loading                                          lost: it may hold half of the weights

A transfer that fails in phase one is given up, and costs a round: nothing was loaded. A publish
without any engine is done at once: whoever joins later is brought to the learner's version.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from eopd.roles import EngineDownError, LearnerDownError
from eopd.types import PolicyVersion, PublishStats, WeightTransferError
from eopd.weights.links import EngineLink, SenderLink
from eopd.weights.probe import Probe, ProbeError, compare_probe

T = TypeVar("T")

PROBE_S = 30.0  # a full engine may have no seat for the probe: then it is not compared this time
PING_S = 10.0  # an engine that does not say its version within this is lost
MAX_ROUNDS = 5  # of one publish; every failed one costs a time-out


class WeightSyncError(RuntimeError):
    """The weights cannot be brought to the engines, though everybody is alive; names the last
    cause.
    """


class BroadcastChannel:
    """A ``WeightChannel``: one sender, any number of engines.

    Args:
        sender: the learner gang.
        engines: by number.
        workers_per_engine: each takes part in the transfer.
        probe: what engines and learner are compared on.
        lose: told the number of an engine that is to be replaced, and why.
        connect_timeout_s: until all have joined the group.
        timeout_s: of every other call to an engine. The sender keeps its own time, bucket by
            bucket.
    """

    def __init__(
        self,
        sender: SenderLink,
        engines: Mapping[int, EngineLink],
        *,
        workers_per_engine: int,
        probe: Probe,
        lose: Callable[[int, str], None],
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self.num_failures = 0
        self._sender = sender
        self._engines = dict(engines)
        self._newcomers: dict[int, EngineLink] = {}
        self._refused: dict[int, str] = {}
        self._workers = workers_per_engine
        self._probe = probe
        self._lose = lose
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._group: Mapping[int, EngineLink] = {}  # whom the wire connects now
        self._sync: _Sync | None = None
        self._lock = asyncio.Lock()
        self._num_published = 0
        self._doing = "idle"

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
            verify = every > 0 and self._num_published % every == 0
            stats = await self._bring_up_to_date(
                dict(self._engines), verify=verify, lose=self._lose
            )
            self._num_published += 1

        if stats.version != version:
            raise WeightSyncError(
                f"{version.label} was to be published, the learner holds {stats.version.label}"
            )

        return stats

    async def join(self, number: int, engine: EngineLink) -> None:
        """Take in an engine that has just started, and bring it to the learner's version.

        Raises:
            EngineDownError: it did not take the weights.
            LearnerDownError: the sender was lost; the newcomer is left out again.
            WeightSyncError: as ``publish``, likewise.
        """
        self._newcomers[number] = engine
        try:
            async with self._lock:
                # else another one's transfer has taken it along, or it left
                if number in self._newcomers and self._waits(number):
                    await self._take_in()
        finally:
            self._newcomers.pop(number, None)
            reason = self._refused.pop(number, "it left")
        if self._engines.get(number) is not engine:
            raise EngineDownError(f"rollout engine {number} did not take the weights: {reason}")

    async def leave(self, number: int) -> None:
        """Leave out an engine, at once: one that is lost fails the transfer that is under way
        with it anyway.
        """
        self._forget(number)

    async def part(self, number: int) -> None:
        """Leave out an engine that is well, once no transfer is under way with it."""
        async with self._lock:
            self._forget(number)

    def disconnect(self) -> None:
        """Build the group again before the next transfer: there is another sender."""
        self._group = {}

    async def _take_in(self) -> None:
        """Bring all newcomers that wait to the learner's version; whoever cannot be is refused,
        with the reason.
        """
        arrived = {
            number: self._newcomers[number] for number in filter(self._waits, self._newcomers)
        }
        await self._bring_up_to_date(
            arrived, verify=self._probe.every > 0, lose=self._refused.__setitem__
        )
        self._engines |= arrived

    def _waits(self, number: int) -> bool:
        """Whether a newcomer is neither taken in nor refused."""
        is_in = self._engines.get(number) is self._newcomers[number]
        return not is_in and number not in self._refused

    async def _bring_up_to_date(
        self, engines: dict[int, EngineLink], *, verify: bool, lose: Callable[[int, str], None]
    ) -> PublishStats:
        """Bring ``engines`` to the learner's version; those that cannot be are taken out of
        them, and lost.
        """
        self._doing = "waiting for the learner"
        async with self._sender.reserved():
            sync = self._sync = _Sync(await self._sender.version(), engines, lose)
            for _ in range(MAX_ROUNDS):
                if not engines:
                    return PublishStats(
                        version=sync.version, transfer_s=0.0, pause_s=0.0, num_bytes=0
                    )

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

        raise WeightSyncError(
            f"{MAX_ROUNDS} transfers of {sync.version.label} failed, last: {sync.cause}"
        )

    async def _transfer_or_repair(self, sync: "_Sync") -> int | None:
        """Bytes sent; None once whoever is to blame or does not answer is dealt with, for
        another round.
        """
        try:
            return await self._transfer(sync)
        except (WeightTransferError, EngineDownError, TimeoutError, OSError) as error:
            sync.cause = sync.cause or str(error) or type(error).__name__

        self.num_failures += 1
        self._group = {}
        for number, reason in sync.blamed.items():
            self._suspect(sync, number, reason)

        sync.blamed.clear()

        for number, answer in (
            await self._each(sync, lambda engine: engine.version(), PING_S)
        ).items():
            if isinstance(answer, BaseException):
                found = str(answer) or "it does not answer"
                self._drop(sync, number, f"{found} (after a weight transfer failed: {sync.cause})")

        return None

    async def _transfer(self, sync: "_Sync") -> int:
        """Phase one; connects first where the group is another one. Returns the bytes sent."""
        sync.cause = ""
        if self._group != sync.engines:
            await self._connect(sync)

        self._doing = "sending"
        begun = await self._each(sync, lambda engine: engine.receive_weights(), self._timeout_s)
        sync.raise_first(begun, "it could not begin to receive")

        try:
            num_bytes = await self._sender.send()
        except WeightTransferError as error:
            self._blame(sync, error, "it left a weight transfer")
            raise

        self._doing = "checking what arrived"
        checks = await self._each(sync, lambda engine: engine.check_weights(), self._timeout_s)
        sync.raise_first(checks, "it did not receive the weights")

        return num_bytes

    async def _connect(self, sync: "_Sync") -> None:
        """Build a group of the sender and the engines of a sync, and of nobody else."""
        self._doing = "building the group"
        members = dict(sync.engines)  # one of them may leave meanwhile
        infos = await self._sender.open([self._workers] * len(members), secrets.token_hex(16))
        accepting = asyncio.ensure_future(self._sender.accept())

        async def connect(number: int, info: Mapping[str, object]) -> None:
            try:
                await members[number].connect_weights(info)
            except WeightTransferError as error:
                # afterwards it is what the others say whom it did not wait for
                if not accepting.done():
                    sync.blamed[number] = f"it could not connect: {error}"

                raise

        joins = [connect(number, info) for number, info in zip(members, infos, strict=True)]

        try:
            await _together(self._connect_timeout_s, accepting, *joins)
        except WeightTransferError as error:
            self._blame(sync, error, "it did not connect", list(members))
            raise

        if sync.engines != members:
            raise WeightTransferError("an engine left while the group was built")

        self._group = members

    async def _install(self, sync: "_Sync") -> float:
        """Phase two, and the proof of it. Returns the longest pause in seconds."""

        async def install(engine: EngineLink) -> float:
            pause_s = await engine.install_weights(sync.version)
            if (serves := await engine.version()) != sync.version:
                raise RuntimeError(
                    f"it serves {serves.label} after {sync.version.label} was installed"
                )

            return pause_s

        self._doing = "installing"
        pauses = [0.0]

        for number, pause_s in (await self._each(sync, install, self._timeout_s)).items():
            if isinstance(pause_s, BaseException):
                self.num_failures += 1
                self._drop(
                    sync, number, f"installing weights failed: {pause_s or type(pause_s).__name__}"
                )
            else:
                pauses.append(pause_s)

        return max(pauses)

    async def _verify(self, sync: "_Sync") -> bool:
        """Whether all engines are near the learner; False where one is to be sent the weights
        once more.
        """
        self._doing = "probing"
        token_ids = self._probe.token_ids
        expected = await self._sender.probe(token_ids)
        repair, sync.gaps = False, []

        for number, logprobs in (
            await self._each(sync, lambda engine: engine.probe(token_ids), PROBE_S)
        ).items():
            if isinstance(logprobs, TimeoutError):
                continue

            if isinstance(logprobs, BaseException):
                self._drop(
                    sync,
                    number,
                    f"it did not answer the probe: {logprobs or type(logprobs).__name__}",
                )
                continue

            try:
                sync.gaps.append(compare_probe(logprobs, expected, dtype=self._probe.dtype))
            except ProbeError as error:
                self.num_failures += 1
                repair = self._suspect(sync, number, str(error)) or repair

        return not repair

    async def _each(
        self, sync: "_Sync", call: Callable[[EngineLink], Awaitable[T]], timeout_s: float
    ) -> dict[int, T | BaseException]:
        """The same call to every engine, each with its own deadline; what came of it, by number."""

        async def one(engine: EngineLink) -> T:
            async with asyncio.timeout(timeout_s):
                return await call(engine)

        engines = dict(sync.engines)
        answers = await asyncio.gather(
            *(one(engine) for engine in engines.values()), return_exceptions=True
        )

        return dict(zip(engines, answers, strict=True))

    def _blame(
        self,
        sync: "_Sync",
        error: WeightTransferError,
        reason: str,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Put a failure of the sender down to the engines whose ranks it names."""
        engines = list(self._group) if numbers is None else numbers
        for rank in getattr(error, "cause", error).ranks:
            sync.blamed.setdefault(engines[(rank - 1) // self._workers], f"{reason}: {error}")

    def _suspect(self, sync: "_Sync", number: int, reason: str) -> bool:
        """Whether an engine that failed gets another chance: it does the first time."""
        sync.cause = f"rollout engine {number}: {reason}"
        first = number not in sync.suspects
        sync.suspects.add(number)
        if not first:
            self._drop(sync, number, f"twice with the same weights: {reason}")

        return first

    def _drop(self, sync: "_Sync", number: int, reason: str) -> None:
        # else it was taken out meanwhile, by whoever replaces or ends it
        stayed = number in sync.engines
        self._forget(number)
        if stayed:
            sync.lose(number, reason)

    def _forget(self, number: int) -> None:
        self._engines.pop(number, None)
        self._newcomers.pop(number, None)
        if self._sync is not None:
            self._sync.engines.pop(number, None)

        if number in self._group:
            self._group = {}


class _Sync:
    """One version on its way to ``engines``.

    ``suspects`` failed once, ``blamed`` are those to whom the failure of this round is put down,
    and why. ``gaps`` (nats) are those of the last probe.
    """

    def __init__(
        self,
        version: PolicyVersion,
        engines: dict[int, EngineLink],
        lose: Callable[[int, str], None],
    ) -> None:
        self.version = version
        self.engines = engines
        self.lose = lose
        self.started = time.monotonic()
        self.cause = ""
        self.suspects: set[int] = set()
        self.blamed: dict[int, str] = {}
        self.gaps: list[float] = []

    def raise_first(self, answers: Mapping[int, object], reason: str) -> None:
        """Raise the first error among answers; those of engines that are alive are put down
        to them.
        """
        errors = {
            number: answer
            for number, answer in answers.items()
            if isinstance(answer, BaseException)
        }
        for number, error in errors.items():
            if isinstance(error, WeightTransferError):
                self.blamed[number] = f"{reason}: {error}"

        for error in errors.values():
            raise error


async def _together(timeout_s: float, *calls: Awaitable[object]) -> None:
    """Await all, also after a failure: a call that is still under way would meet the next
    round's.
    """
    async with asyncio.timeout(timeout_s):
        results = await asyncio.gather(*calls, return_exceptions=True)

    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, LearnerDownError)):
        raise error
