"""Brings rollout engines to the learner's version over the weight wire: the driver's view.

    driver, here             learner ranks: the sender          engines, which go on generating
    ────────────             ─────────────────────────          ───────────────────────────────
    probe           ───────▶ log-probabilities of one text, at intervals
    open            ───────▶ opens a store
                    ◀─────── one InitInfo for each engine
    connect_weights ──────────────────────────────────────────▶ join the group   ┐ only where the engines are others
    accept          ───────▶ joins, and waits for all engines ◀─────────────────▶┘ than in the last transfer
    begin_weights   ──────────────────────────────────────────▶ start a thread that receives
    send            ───────▶ sends every bucket ──────────────▶ into host memory         phase one: nothing is loaded
                    ◀─────── the bytes, once all have all
    check_weights   ──────────────────────────────────────────▶ is all here, is every hash right?
    install_weights ──────────────────────────────────────────▶ pause, load, label, resume               phase two
    version         ──────────────────────────────────────────▶ must be the learner's
    probe           ──────────────────────────────────────────▶ do log-probabilities of one text agree?

Every call ends on all engines before the next one begins, but that ``accept`` runs while they connect,
and that each says its version once it has installed. Besides that, these wait:

    who                       waits for
    a step of the learner     the end of the sync (``SenderLink.reserved``)
    a part of a step          the end of the sending (``SenderLink.undisturbed``)
    a publish                 a step, publish or join that is under way
    a join                    the same; engines that arrive meanwhile are then joined in one transfer
    generation on an engine   the installation on that engine alone

A publish goes to all engines, a join to the newcomers alone: the others serve the learner's version
already, and are neither sent to nor paused.

    what fails                                        what becomes of the engine
    connecting, receiving, a wrong hash or probe      all is sent once more; the second time it is lost
    the answer to a call                              lost, if it does not answer a ping either
    loading                                           lost: it may hold half of the weights

A transfer that fails in phase one costs a round of ``MAX_ROUNDS``. A publish without any engine is
done at once: an engine that joins later is brought to the learner's version.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from eopd.roles import EngineDownError, EngineLink, LearnerDownError, SenderLink
from eopd.run.progress import first_line
from eopd.types import Float32Array, PolicyVersion, PublishStats, WeightTransferError
from eopd.weights.probe import Probe, ProbeError, compare_probe

T = TypeVar("T")

PROBE_S = 30.0  # a full engine may have no seat for the probe: then it is not compared this time
PING_S = 10.0  # an engine that does not answer with its version within this time is lost
MAX_ROUNDS = 5  # transfers of one publish; every failed one costs a time-out


class WeightSyncError(RuntimeError):
    """The weights cannot be brought to the engines, though all are alive; names the last cause."""


class BroadcastChannel:
    """A ``WeightChannel``: one sender, any number of engines.

    Args:
        sender: the learner gang.
        engines: by number.
        probe: what engines and learner are compared on.
        lose: called with the number of an engine that is to be replaced, and the reason.
        connect_timeout_s: the limit until all have joined the group.
        timeout_s: the limit of every other call to an engine. The sender has a limit of its own for
            each bucket.
    """

    def __init__(
        self,
        sender: SenderLink,
        engines: Mapping[int, EngineLink],
        *,
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
        self._probe = probe
        self._lose = lose
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._group: Mapping[int, EngineLink] = {}  # the engines that the wire connects now
        self._sync: _Sync | None = None
        self._lock = asyncio.Lock()
        self._num_published = 0
        self._doing = "idle"

    def status(self) -> str:
        """Returns for people what goes on."""
        return f"{self._doing if self._lock.locked() else 'idle'}, {len(self._engines)} engines"

    async def publish(
        self, version: PolicyVersion, on_sent: Callable[[], None] = lambda: None
    ) -> PublishStats:
        """Bring every engine to ``version``, which the learner holds.

        ``on_sent`` is called when the learner has sent it, each time that it has to.

        Raises:
            WeightSyncError: ``MAX_ROUNDS`` transfers failed, or the learner holds another version.
            LearnerDownError: the sender is lost.
        """
        async with self._lock:
            interval = self._probe.every
            verify = interval > 0 and self._num_published % interval == 0
            stats = await self._bring_up_to_date(
                dict(self._engines), verify=verify, lose=self._lose, on_sent=on_sent
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
            LearnerDownError: the sender was lost; the newcomer is not in the channel.
            WeightSyncError: ``MAX_ROUNDS`` transfers failed; the newcomer is not in the channel.
        """
        self._newcomers[number] = engine
        try:
            async with self._lock:
                # otherwise the transfer of another newcomer included it, or it was dropped
                if number in self._newcomers and self._waits(number):
                    await self._take_in()
        finally:
            self._newcomers.pop(number, None)
            reason = self._refused.pop(number, "it was dropped")
        if self._engines.get(number) is not engine:
            raise EngineDownError(f"rollout engine {number} did not take the weights: {reason}")

    async def drop(self, number: int) -> None:
        """Drop an engine that is lost, at once: a transfer with it fails anyway."""
        self._forget(number)

    async def remove(self, number: int) -> None:
        """Remove an engine that is well, once no transfer is under way with it."""
        async with self._lock:
            self._forget(number)

    def disconnect(self) -> None:
        """Have the group built again before the next transfer, since the sender is another."""
        self._group = {}

    async def _take_in(self) -> None:
        """Bring all newcomers that wait to the learner's version; note why others cannot be."""
        arrived = {
            number: self._newcomers[number] for number in filter(self._waits, self._newcomers)
        }
        await self._bring_up_to_date(
            arrived, verify=self._probe.every > 0, lose=self._refused.__setitem__
        )
        self._engines |= arrived

    def _waits(self, number: int) -> bool:
        """Returns whether a newcomer is neither taken in nor refused."""
        is_in = self._engines.get(number) is self._newcomers[number]
        return not is_in and number not in self._refused

    async def _bring_up_to_date(
        self,
        engines: dict[int, EngineLink],
        *,
        verify: bool,
        lose: Callable[[int, str], None],
        on_sent: Callable[[], None] = lambda: None,
    ) -> PublishStats:
        """Bring ``engines`` to the learner's version.

        Those that cannot be are taken out of the mapping, and ``lose`` is called for them.
        """
        self._doing = "waiting for the learner"
        async with self._sender.reserved():
            sync = self._sync = _Sync(await self._sender.version(), engines, lose, on_sent)
            if verify and engines:
                sync.expected = await self._sender.probe(self._probe.token_ids)

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
                if sync.expected is None or await self._verify(sync, sync.expected):
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
        """Returns the bytes sent; None where the transfer failed, once the engines at fault and
        those that do not answer are dealt with.
        """
        try:
            return await self._transfer(sync)
        except (WeightTransferError, EngineDownError, TimeoutError, OSError) as error:
            sync.cause = sync.cause or first_line(error)

        self.num_failures += 1
        self._group = {}
        for number, reason in sync.faults.items():
            self._forgive_once(sync, number, reason)

        sync.faults.clear()
        versions = await self._each(sync, lambda engine: engine.version(), PING_S)

        for number, answer in versions.items():
            if isinstance(answer, BaseException):
                reason = str(answer) or "it does not answer"
                self._lose_engine(
                    sync, number, f"{reason} (after a weight transfer failed: {sync.cause})"
                )

        return None

    async def _transfer(self, sync: "_Sync") -> int:
        """Goes through phase one; connects first where the engines are others than last time.

        Returns:
            The bytes sent.
        """
        sync.cause = ""
        # who waits for the learner's next call has a limit of time
        async with self._sender.undisturbed():
            if self._group != sync.engines:
                await self._connect(sync)

            num_bytes = await self._send(sync)

        self._doing = "checking what arrived"
        checks = await self._each(
            sync,
            lambda engine: engine.check_weights(),
            self._timeout_s,
        )
        sync.raise_first(checks, "it did not receive the weights")

        return num_bytes

    async def _send(self, sync: "_Sync") -> int:
        self._doing = "sending"
        members = list(self._group)  # one that is dropped meanwhile ends the group
        starts = await self._each(
            sync,
            lambda engine: engine.begin_weights(),
            self._timeout_s,
        )
        sync.raise_first(starts, "it could not begin to receive")

        try:
            num_bytes = await self._sender.send()
        except WeightTransferError as error:
            self._attribute(sync, error, "it left a weight transfer", members)
            raise

        sync.on_sent()
        return num_bytes

    async def _connect(self, sync: "_Sync") -> None:
        """Build a group of the sender and the engines of a sync."""
        self._doing = "building the group"
        members = dict(sync.engines)  # one of them may be dropped meanwhile
        infos = await self._sender.open(len(members), secrets.token_hex(16))
        accepting = asyncio.ensure_future(self._sender.accept())

        async def connect(number: int, info: Mapping[str, object]) -> None:
            try:
                await members[number].connect_weights(info)
            except WeightTransferError as error:
                # Once the sender has given up, every engine that it did not wait for fails too.
                if not accepting.done():
                    sync.faults[number] = f"it could not connect: {error}"

                raise

        joins = [connect(number, info) for number, info in zip(members, infos, strict=True)]

        try:
            await _together(self._connect_timeout_s, accepting, *joins)
        except WeightTransferError as error:
            self._attribute(sync, error, "it did not connect", list(members))
            raise

        if sync.engines != members:
            raise WeightTransferError("an engine was dropped while the group was built")

        self._group = members

    async def _install(self, sync: "_Sync") -> float:
        """Goes through phase two, and asks every engine afterwards which version it serves.

        Returns:
            The longest pause in seconds.
        """

        async def install(engine: EngineLink) -> float:
            pause_s = await engine.install_weights(sync.version)
            if (serves := await engine.version()) != sync.version:
                raise RuntimeError(
                    f"it serves {serves.label} after {sync.version.label} was installed"
                )

            return pause_s

        self._doing = "installing"
        answers = await self._each(sync, install, self._timeout_s)
        longest_s = 0.0

        for number, answer in answers.items():
            if isinstance(answer, BaseException):
                self.num_failures += 1
                reason = f"installing weights failed: {answer or type(answer).__name__}"
                self._lose_engine(sync, number, reason)
            else:
                longest_s = max(longest_s, answer)

        return longest_s

    async def _verify(self, sync: "_Sync", expected: Float32Array) -> bool:
        """Compares all engines with what the learner said of the probe.

        Returns:
            False where the weights are to be sent to an engine once more.
        """
        self._doing = "probing"
        token_ids = self._probe.token_ids
        answers = await self._each(sync, lambda engine: engine.probe(token_ids), PROBE_S)
        send_again, sync.gaps = False, []

        for number, answer in answers.items():
            if isinstance(answer, TimeoutError):
                continue

            if isinstance(answer, BaseException):
                reason = f"it did not answer the probe: {answer or type(answer).__name__}"
                self._lose_engine(sync, number, reason)
                continue

            try:
                sync.gaps.append(compare_probe(answer, expected, dtype=self._probe.dtype))
            except ProbeError as error:
                self.num_failures += 1
                send_again |= self._forgive_once(sync, number, str(error))

        return not send_again

    async def _each(
        self, sync: "_Sync", call: Callable[[EngineLink], Awaitable[T]], timeout_s: float
    ) -> dict[int, T | BaseException]:
        """Make the same call to every engine, each with its own deadline.

        Returns:
            The answer or the error of each engine, by its number.
        """

        async def call_in_time(engine: EngineLink) -> T:
            async with asyncio.timeout(timeout_s):
                return await call(engine)

        engines = dict(sync.engines)
        answers = await asyncio.gather(*map(call_in_time, engines.values()), return_exceptions=True)

        return dict(zip(engines, answers, strict=True))

    def _attribute(
        self, sync: "_Sync", error: WeightTransferError, reason: str, engines: Sequence[int]
    ) -> None:
        """Put a failure of the sender down to those of the group's engines whose ranks it names."""
        for rank in getattr(error, "cause", error).ranks:
            sync.faults.setdefault(engines[rank - 1], f"{reason}: {error}")

    def _forgive_once(self, sync: "_Sync", number: int, reason: str) -> bool:
        """Note a fault of an engine; the second one with the same weights loses it.

        Returns:
            Whether it was the first.
        """
        sync.cause = f"rollout engine {number}: {reason}"
        is_first = number not in sync.forgiven
        sync.forgiven.add(number)
        if not is_first:
            self._lose_engine(sync, number, f"twice with the same weights: {reason}")

        return is_first

    def _lose_engine(self, sync: "_Sync", number: int, reason: str) -> None:
        # otherwise it was taken out meanwhile, by the fleet that replaces or ends it
        was_in = number in sync.engines
        self._forget(number)
        if was_in:
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

    ``expected`` is what the learner says of the probe, None where engines are not asked. ``faults`` are
    the reasons, by engine, why the transfer of this round failed; engines in ``forgiven`` had a
    fault before. ``gaps`` are the differences at the last probe, in nats.
    """

    def __init__(
        self,
        version: PolicyVersion,
        engines: dict[int, EngineLink],
        lose: Callable[[int, str], None],
        on_sent: Callable[[], None],
    ) -> None:
        self.version = version
        self.engines = engines
        self.lose = lose
        self.on_sent = on_sent
        self.expected: Float32Array | None = None
        self.started = time.monotonic()
        self.cause = ""
        self.forgiven: set[int] = set()
        self.faults: dict[int, str] = {}
        self.gaps: list[float] = []

    def raise_first(self, answers: Mapping[int, object], reason: str) -> None:
        """Raise the first error among answers; those of engines that are alive are their faults."""
        errors = []
        for number, answer in answers.items():
            if isinstance(answer, BaseException):
                errors.append(answer)

            if isinstance(answer, WeightTransferError):
                self.faults[number] = f"{reason}: {answer}"

        if errors:
            raise errors[0]


async def _together(timeout_s: float, *calls: Awaitable[object]) -> None:
    """Await all, also after a failure: a call that is still under way would collide with those of
    the next round.
    """
    async with asyncio.timeout(timeout_s):
        results = await asyncio.gather(*calls, return_exceptions=True)

    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, LearnerDownError)):
        raise error
