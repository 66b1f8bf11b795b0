"""The driver's view of the wire: brings every engine to a version, in two phases.

sender (learner ranks)                       engines (generation goes on)
  open ──────────── InitInfo ──────────────▶ connect_weights          once, and again when the set of engines changes
  send ──────────── buckets ───────────────▶ receive_weights          phase one: into host memory
                                             install_weights          phase two: pause, load, label, resume
                                             version                  asked back from every engine
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from eopd.types import PolicyVersion, PublishStats


class SenderLink(Protocol):
    """The learner gang's ``WeightSender``, seen from the driver."""

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
    """A ``WeightChannel``: one sender, any number of engines."""

    def __init__(self, sender: SenderLink, engines: Sequence[EngineLink], *, workers_per_engine: int) -> None:
        self._sender = sender
        self._engines = engines
        self._workers = workers_per_engine

    async def connect(self) -> None:
        """Build the group; every member must join within the time-out."""
        infos = await self._sender.open([self._workers] * len(self._engines))
        joins = (engine.connect_weights(info) for engine, info in zip(self._engines, infos, strict=True))
        await asyncio.gather(self._sender.accept(), *joins)

    async def publish(self, version: PolicyVersion) -> PublishStats:
        """Bring every engine to ``version``.

        Raises:
            RuntimeError: an engine reports another version afterwards.
        """
        started = time.monotonic()
        await asyncio.gather(*(engine.receive_weights() for engine in self._engines))
        num_bytes = await self._sender.send()
        transfer_s = time.monotonic() - started
        pauses = await asyncio.gather(*(engine.install_weights(version) for engine in self._engines))
        reported = await asyncio.gather(*(engine.version() for engine in self._engines))
        if wrong := [f"engine {i} serves {v.label}" for i, v in enumerate(reported) if v != version]:
            raise RuntimeError(f"after publishing {version.label}: {', '.join(wrong)}")
        return PublishStats(version=version, transfer_s=transfer_s, pause_s=max(pauses), num_bytes=num_bytes)
