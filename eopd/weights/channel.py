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
from eopd.weights.sync import Sync, WeightSyncError


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
        self._sync = Sync(
            sender,
            probe,
            lost=self._lost,
            connect_timeout_s=connect_timeout_s,
            timeout_s=timeout_s,
        )
        self._verify_every = probe.every
        self._lose = lose
        self._engines = dict(engines)
        self._newcomers: dict[int, EngineLink] = {}
        self._refused: dict[int, str] = {}
        self._lock = asyncio.Lock()
        self._num_published = 0
        self._sender_loss: LearnerDownError | None = None
        self._is_sender_lost = asyncio.Event()

    @property
    def num_failures(self) -> int:
        """The number of transfers, installations and probes that failed."""
        return self._sync.num_failures

    def status(self) -> str:
        """Returns for people what goes on."""
        doing = self._sync.doing if self._lock.locked() else "idle"
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
            every = self._verify_every
            verify = every > 0 and self._num_published % every == 0
            stats = await self._sync.run(dict(self._engines), verify=verify, on_sent=on_sent)
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
                if self._newcomers.get(number) is engine:
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
        self._sync.group = {}
        self._is_sender_lost.clear()

    async def _take_in(self) -> None:
        """Bring all newcomers that wait to the learner's version; note why others cannot be."""
        arrived = dict(self._newcomers)
        await self._sync.run(arrived, verify=self._verify_every > 0)
        self._engines |= arrived
        waiting = self._newcomers.items()
        self._newcomers = {
            number: engine for number, engine in waiting if arrived.get(number) is not engine
        }

    def _lost(self, number: int, reason: str) -> None:
        """Takes out an engine that cannot be brought to the learner's version."""
        has_joined = number not in self._newcomers
        self._forget(number)
        if has_joined:
            self._lose(number, reason)
        else:
            self._refused[number] = reason

    def _forget(self, number: int) -> None:
        self._engines.pop(number, None)
        self._newcomers.pop(number, None)
        self._sync.engines.pop(number, None)
        if number in self._sync.group:
            self._sync.group = {}
