"""Brings one version of the weights to some rollout engines, over the weight wire: the driver's view.

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
and that each says its version once it has installed.

    what fails                                        what becomes of the engine
    connecting, receiving, a wrong hash or probe      all is sent once more; the second time it is lost
    the answer to a call                              lost, if it does not answer a ping either
    loading                                           lost: it may hold half of the weights

A transfer that fails in phase one costs a round of ``MAX_ROUNDS``.
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
MAX_ROUNDS = 5  # transfers of one sync; every failed one costs a time-out


class WeightSyncError(RuntimeError):
    """The weights cannot be brought to the engines, though all are alive; names the last cause."""


class Sync:
    """Syncs bring the learner's version to engines, one sync after the other.

    ``engines`` has those of the sync under way by number: whoever is dropped meanwhile is taken out,
    here or by the channel. ``group`` has those that are connected to the sender now, and ``doing`` is
    for people. ``lost`` is called with the number of an engine that cannot be brought there, and the
    reason; it takes the engine out.
    """

    def __init__(
        self,
        sender: SenderLink,
        probe: Probe,
        *,
        lost: Callable[[int, str], None],
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self.engines: dict[int, EngineLink] = {}
        self.group: Mapping[int, EngineLink] = {}
        self.num_failures = 0
        self.doing = "idle"
        self._sender = sender
        self._probe = probe
        self._lost = lost
        self._on_sent: Callable[[], None] = lambda: None
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._forgiven: set[int] = set()  # had a fault before, in this sync
        self._faults: dict[int, str] = {}  # of the transfer of this round, by engine
        self._cause = ""  # of the last failure

    async def run(
        self,
        engines: dict[int, EngineLink],
        *,
        verify: bool,
        on_sent: Callable[[], None] = lambda: None,
    ) -> PublishStats:
        """Brings engines to the learner's version, and compares them with it if ``verify``. Whoever
        cannot be brought there is taken out of the mapping. ``on_sent`` is called when the learner has
        sent its weights, each time that it has to.

        Raises:
            WeightSyncError: ``MAX_ROUNDS`` transfers failed.
            LearnerDownError: the sender is lost.
        """
        self.engines, self._on_sent = engines, on_sent
        self._forgiven.clear()
        self._faults.clear()
        self.doing = "waiting for the learner"
        async with self._sender.reserved:
            version, started = await self._sender.version(), time.monotonic()
            expected = None
            if verify and self.engines:
                expected = await self._sender.probe(self._probe.token_ids)

            for _ in range(MAX_ROUNDS):
                if not self.engines:
                    return PublishStats(version=version, transfer_s=0.0, pause_s=0.0, num_bytes=0)

                num_bytes = await self._transfer_or_repair()
                if num_bytes is None:
                    continue

                transfer_s = time.monotonic() - started
                pause_s = await self._install(version)
                gaps = [] if expected is None else await self._compare(expected)
                if gaps is not None:
                    return PublishStats(
                        version=version,
                        transfer_s=transfer_s,
                        pause_s=pause_s,
                        num_bytes=num_bytes,
                        probe_nats=max(gaps, default=None),
                    )

        raise WeightSyncError(
            f"{MAX_ROUNDS} transfers of {version.label} failed, last: {self._cause}"
        )

    async def _transfer_or_repair(self) -> int | None:
        """Returns the bytes sent; None where the transfer failed, once the engines at fault and
        those that do not answer are dealt with.
        """
        try:
            return await self._transfer()
        except (WeightTransferError, EngineDownError, TimeoutError, OSError) as error:
            self._cause = self._cause or first_line(error)

        self.num_failures += 1
        self.group = {}
        for number, reason in self._faults.items():
            self._forgive_once(number, reason)

        self._faults.clear()
        versions = await self._each(lambda engine: engine.version(), PING_S)

        for number, answer in versions.items():
            if isinstance(answer, BaseException):
                reason = str(answer) or "it does not answer"
                self._lose(number, f"{reason} (after a weight transfer failed: {self._cause})")

        return None

    async def _transfer(self) -> int:
        """Goes through phase one; connects first where the engines are others than last time.

        Returns:
            The bytes sent.
        """
        self._cause = ""
        # who waits for the learner's next call has a limit of time
        async with self._sender.undisturbed:
            if self.group != self.engines:
                await self._connect()

            num_bytes = await self._send()

        self.doing = "checking what arrived"
        checks = await self._each(lambda engine: engine.check_weights(), self._timeout_s)
        self._raise_first(checks, "it did not receive the weights")

        return num_bytes

    async def _connect(self) -> None:
        """Build a group of the sender and the engines."""
        members = dict(self.engines)  # one of them may be dropped meanwhile
        self.doing = "building the group"
        infos = await self._sender.open(len(members), secrets.token_hex(16))
        accepting = asyncio.ensure_future(self._sender.accept())

        async def connect(number: int, info: Mapping[str, object]) -> None:
            try:
                await members[number].connect_weights(info)
            except WeightTransferError as error:
                # Once the sender has given up, every engine that it did not wait for fails too.
                if not accepting.done():
                    self._faults[number] = f"it could not connect: {error}"

                raise

        joins = [connect(number, info) for number, info in zip(members, infos, strict=True)]

        try:
            await _together(self._connect_timeout_s, accepting, *joins)
        except WeightTransferError as error:
            self._attribute(error, "it did not connect", list(members))
            raise

        if self.engines != members:
            raise WeightTransferError("an engine was dropped while the group was built")

        self.group = members

    async def _send(self) -> int:
        """Has the engines receive what the sender sends; returns the bytes."""
        self.doing = "sending"
        members = list(self.group)  # one that is dropped meanwhile ends the group
        starts = await self._each(lambda engine: engine.begin_weights(), self._timeout_s)
        self._raise_first(starts, "it could not begin to receive")

        try:
            num_bytes = await self._sender.send()
        except WeightTransferError as error:
            self._attribute(error, "it left a weight transfer", members)
            raise

        self._on_sent()
        return num_bytes

    async def _install(self, version: PolicyVersion) -> float:
        """Goes through phase two, and asks every engine afterwards which version it serves.

        Returns:
            The longest pause in seconds.
        """

        async def install(engine: EngineLink) -> float:
            pause_s = await engine.install_weights(version)
            if (serves := await engine.version()) != version:
                raise RuntimeError(f"it serves {serves.label} after {version.label} was installed")

            return pause_s

        self.doing = "installing"
        answers = await self._each(install, self._timeout_s)
        longest_s = 0.0

        for number, answer in answers.items():
            if isinstance(answer, BaseException):
                self.num_failures += 1
                self._lose(number, f"installing weights failed: {answer or type(answer).__name__}")
            else:
                longest_s = max(longest_s, answer)

        return longest_s

    async def _compare(self, expected: Float32Array) -> Sequence[float] | None:
        """Compares all engines with what the learner said of the probe.

        Returns:
            The differences in nats; None where the weights are to be sent to an engine once more.
        """
        self.doing = "probing"
        answers = await self._each(lambda engine: engine.probe(self._probe.token_ids), PROBE_S)
        gaps, send_again = [], False

        for number, answer in answers.items():
            if isinstance(answer, TimeoutError):
                continue

            if isinstance(answer, BaseException):
                reason = f"it did not answer the probe: {answer or type(answer).__name__}"
                self._lose(number, reason)
                continue

            try:
                gaps.append(compare_probe(answer, expected, dtype=self._probe.dtype))
            except ProbeError as error:
                self.num_failures += 1
                send_again |= self._forgive_once(number, str(error))

        return None if send_again else gaps

    async def _each(
        self, call: Callable[[EngineLink], Awaitable[T]], timeout_s: float
    ) -> dict[int, T | BaseException]:
        """Make the same call to every engine, each with its own deadline.

        Returns:
            The answer or the error of each engine, by its number.
        """

        async def call_in_time(engine: EngineLink) -> T:
            async with asyncio.timeout(timeout_s):
                return await call(engine)

        engines = dict(self.engines)
        answers = await asyncio.gather(*map(call_in_time, engines.values()), return_exceptions=True)

        return dict(zip(engines, answers, strict=True))

    def _raise_first(self, answers: Mapping[int, object], reason: str) -> None:
        """Raise the first error among answers; those of engines that are alive are their faults."""
        for number, answer in answers.items():
            if isinstance(answer, WeightTransferError):
                self._faults[number] = f"{reason}: {answer}"

        for answer in answers.values():
            if isinstance(answer, BaseException):
                raise answer

    def _attribute(self, error: WeightTransferError, reason: str, engines: Sequence[int]) -> None:
        """Put a failure of the sender down to those of the group's engines whose ranks it names."""
        for rank in getattr(error, "cause", error).ranks:
            self._faults.setdefault(engines[rank - 1], f"{reason}: {error}")

    def _forgive_once(self, number: int, reason: str) -> bool:
        """Note a fault of an engine; the second one with the same weights loses it.

        Returns:
            Whether it was the first.
        """
        self._cause = f"rollout engine {number}: {reason}"
        is_first = number not in self._forgiven
        self._forgiven.add(number)
        if not is_first:
            self._lose(number, f"twice with the same weights: {reason}")

        return is_first

    def _lose(self, number: int, reason: str) -> None:
        if number in self.engines:  # else the fleet has replaced or ended it meanwhile
            self._lost(number, reason)


async def _together(timeout_s: float, *calls: Awaitable[object]) -> None:
    """Await all, also after a failure: a call that is still under way would collide with those of
    the next round.
    """
    async with asyncio.timeout(timeout_s):
        results = await asyncio.gather(*calls, return_exceptions=True)

    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, LearnerDownError)):
        raise error
