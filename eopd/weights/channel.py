"""Keeps rollout engines at the learner's version: which engines are in, and whose turn it is.

How one version gets to some engines is told in ``weights/sync.py``. Here these wait for another:

    who                       waits for
    a step of the learner     the end of the sync (``SenderLink.reserved``)
    a part of a step          the end of the sending (``SenderLink.undisturbed``)
    a publish                 a step, publish or join that is under way
    a join                    the same; engines that arrive meanwhile are then joined in one transfer
    generation on an engine   the installation on that engine alone

A publish goes to all engines, a join to the newcomers alone: the others serve the learner's version
already, and are neither sent to nor paused. A publish without any engine is done at once: an engine
that joins later is brought to the learner's version.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Never

from eopd.roles import EngineDownError, EngineLink, LearnerDownError, SenderLink
from eopd.types import PolicyVersion, PublishStats
from eopd.weights.probe import Probe
from eopd.weights.sync import Connection, Lose, Sync, WeightSyncError


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
        lose: Lose,
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._connection = Connection(
            sender, probe, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s
        )
        self._lose = lose
        self._engines = dict(engines)
        self._newcomers: dict[int, EngineLink] = {}
        self._refused: dict[int, str] = {}
        self._sync: Sync | None = None
        self._lock = asyncio.Lock()
        self._num_published = 0
        self._sender_loss: LearnerDownError | None = None
        self._is_sender_lost = asyncio.Event()

    @property
    def num_failures(self) -> int:
        """The number of transfers, installations and probes that failed."""
        return self._connection.num_failures

    def status(self) -> str:
        """Returns for people what goes on."""
        doing = self._connection.doing if self._lock.locked() else "idle"
        return f"{doing}, {len(self._engines)} engines"

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
            interval = self._connection.probe.every
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
        except LearnerDownError as error:
            self._sender_loss = error
            self._is_sender_lost.set()
            raise
        finally:
            self._newcomers.pop(number, None)
            reason = self._refused.pop(number, "it was dropped")
        if self._engines.get(number) is not engine:
            raise EngineDownError(f"rollout engine {number} did not take the weights: {reason}")

    async def sender_lost(self) -> Never:
        """Waits until a newcomer finds the sender lost, and raises its ``LearnerDownError``. Nobody else
        may find out: where no engine is left, the loop waits for this newcomer.
        """
        await self._is_sender_lost.wait()
        assert self._sender_loss is not None
        raise self._sender_loss

    async def drop(self, number: int) -> None:
        """Drop an engine that is lost, at once: a transfer with it fails anyway."""
        self._forget(number)

    async def remove(self, number: int) -> None:
        """Remove an engine that is well, once no transfer is under way with it."""
        async with self._lock:
            self._forget(number)

    def disconnect(self) -> None:
        """Have the group built again before the next transfer, since the sender is another."""
        self._connection.group = {}
        self._is_sender_lost.clear()

    async def _take_in(self) -> None:
        """Bring all newcomers that wait to the learner's version; note why others cannot be."""
        arrived = {
            number: self._newcomers[number] for number in filter(self._waits, self._newcomers)
        }
        await self._bring_up_to_date(
            arrived, verify=self._connection.probe.every > 0, lose=self._refused.__setitem__
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
        lose: Lose,
        on_sent: Callable[[], None] = lambda: None,
    ) -> PublishStats:
        """Bring ``engines`` to the learner's version.

        Those that cannot be are taken out of the mapping, and ``lose`` is called for them.
        """

        def lost(number: int, reason: str) -> None:
            self._forget(number)
            lose(number, reason)

        self._sync = Sync(self._connection, engines, lost, on_sent)
        return await self._sync.run(verify=verify)

    def _forget(self, number: int) -> None:
        self._engines.pop(number, None)
        self._newcomers.pop(number, None)
        if self._sync is not None:
            self._sync.engines.pop(number, None)

        if number in self._connection.group:
            self._connection.group = {}
