"""The gang of all learner ranks: they start together, answer together, and are lost together."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from eopd.config import Config, ConfigError
from eopd.roles import BodiesLostError, LearnerDownError
from eopd.run.lock import Holder
from eopd.runtime.actors import Spawn, dies_as
from eopd.runtime.learner_actor import LearnerActor
from eopd.runtime.placement import plan_learner
from eopd.types import (
    EvalStats,
    Float32Array,
    Int32Array,
    LearnerStats,
    PackedBatch,
    PolicyVersion,
    RunFailedError,
    TrajectoryKey,
)

# How long Ray may take to report a rank that was lost with its node: it asks a node every 3 s,
# waits 10 s, and believes the fifth failure (health_check_period_ms, _timeout_ms and
# _failure_threshold of Ray 2.60).
_REPORT_S = 90.0
# How long ranks may take to begin where there is room: a process each, which imports nothing heavy.
_ROOM_S = 15.0


class LearnerGang:
    """A ``Learner`` and a ``SenderLink`` that calls all learner actors together.

    When a rank dies, or does not answer within ``learner.timeout_s``, all are lost: every call
    raises ``LearnerDownError`` until ``start`` has started new ranks. Where some of these find no
    room, ``give_way`` is called with their number, for others to leave it to them for the time of a
    context.
    """

    def __init__(self, spawn: Spawn, config: Config, driver: Holder | None = None) -> None:
        self._spawn = spawn
        self._config = config
        self._driver = driver  # the holder of the run directory, where the ranks write there
        self._timeout_s = config.learner.timeout_s
        self.give_way: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext()
        # a weight sync holds it, so that no step comes between its calls
        self.reserved = asyncio.Lock()
        # and this one while it sends, so that none of its calls waits for a part of a batch, which may
        # take longer than the engines wait; the ranks hold one share at a time
        self.undisturbed = asyncio.Lock()
        self._actors: list[ActorHandle] = []

    async def start(self, incarnation: int) -> None:
        """Start all ranks anew, in place of earlier ones: they meet at rank 0, with the student as
        the config has it.

        Raises:
            LearnerDownError: one of them died, or they are not up within
                ``cluster.start_timeout_s``.
            ConfigError: a rank found the user's mistake, such as a run directory that is another
                one on its node.
        """
        for actor in self._actors:
            ray.kill(actor)  # so that a call that still holds the gang fails at once

        async with self.reserved:
            await self._start(incarnation)

    async def _start(self, incarnation: int) -> None:
        self._actors = self._spawn(
            LearnerActor, plan_learner(self._config.learner), range(self._config.learner.ranks)
        )
        limit_s = self._config.cluster.start_timeout_s

        try:
            async with asyncio.timeout(limit_s):
                await self._find_room()
                with dies_as(LearnerDownError):
                    address, port = await self._actors[0].rendezvous.remote()

                await self._all(
                    [
                        actor.start.remote(
                            self._config, rank, address, port, incarnation, self._driver
                        )
                        for rank, actor in enumerate(self._actors)
                    ]
                )
        except TimeoutError:
            raise LearnerDownError(f"not up within cluster.start_timeout_s = {limit_s:g}") from None

    async def _find_room(self) -> None:
        """Waits until every rank has begun."""
        pings = [asyncio.ensure_future(_begun(actor)) for actor in self._actors]
        try:
            _, waiting = await asyncio.wait(pings, timeout=_ROOM_S)
            with self.give_way(len(waiting)) if waiting else nullcontext():
                await asyncio.gather(*pings)
        finally:
            for ping in pings:
                ping.cancel()

    async def accumulate(self, part: PackedBatch) -> None:
        """Adds up gradients. No weights change, so that a sync may be under way that has sent them."""
        await self._work("accumulate", part)

    async def step(self, batch: PackedBatch) -> LearnerStats:  # noqa: D102
        async with self.reserved:
            return await self._work("step", batch)  # type: ignore[return-value]

    async def evaluate(self, batch: PackedBatch) -> EvalStats:  # noqa: D102
        async with self.reserved:
            return await self._work("evaluate", batch)  # type: ignore[return-value]

    async def _work(self, method: str, batch: PackedBatch) -> object:
        async with self.undisturbed:
            await self._hand_over(batch)
            return (await self._each(method))[0]

    async def save(self, directory: Path) -> None:  # noqa: D102
        async with self.reserved:
            await self._each("save", directory)

    async def load(self, directory: Path, *, fresh_optimizer: bool = False) -> None:  # noqa: D102
        async with self.reserved:
            await self._each("load", directory, fresh_optimizer)

    async def export(self, directory: Path, adapter: Path) -> None:
        """Write the student as a Hugging Face directory, and with LoRA its adapter."""
        async with self.reserved:
            await self._each("export", directory, adapter)

    async def version(self) -> PolicyVersion:
        """The weights the ranks hold."""
        return PolicyVersion(*(await self._each("version"))[0])  # type: ignore[misc]

    async def open(self, engines: int, secret: str) -> Sequence[Mapping[str, object]]:  # noqa: D102
        return (await self._each("open_wire", engines, secret))[0]  # type: ignore[return-value]

    async def accept(self) -> None:  # noqa: D102
        await self._each("accept_engines")

    async def send(self) -> int:  # noqa: D102
        return (await self._each("send_weights"))[0]  # type: ignore[return-value]

    async def probe(self, token_ids: Int32Array) -> Float32Array:
        """Returns the student's log-probabilities of a fixed text, for ``weights/probe.py``."""
        return (await self._each("probe", token_ids))[0]  # type: ignore[return-value]

    async def _each(self, method: str, *arguments: object) -> list[object]:
        return await self._all(
            [getattr(actor, method).remote(*arguments) for actor in self._actors]
        )

    async def _hand_over(self, batch: PackedBatch) -> None:
        """Have every rank fetch its trajectories, before any rank begins.

        Raises:
            BodiesLostError: some are gone with their node; the ranks are as they were.
        """
        calls = [actor.take.remote(batch.share(rank)) for rank, actor in enumerate(self._actors)]
        lost = cast(list[list[TrajectoryKey]], await self._all(calls))
        if keys := list(chain.from_iterable(lost)):
            raise BodiesLostError(keys)

    async def _all(self, calls: Sequence[Awaitable[object]]) -> list[object]:
        """Await the same call on every rank.

        Raises:
            LearnerDownError: a rank is dead, or does not answer.
        """
        try:
            with dies_as(LearnerDownError):
                async with asyncio.timeout(self._timeout_s):
                    return list(await asyncio.gather(*calls))
        except TimeoutError:
            raise LearnerDownError(
                f"no answer within learner.timeout_s = {self._timeout_s:g}"
            ) from None
        except RayTaskError as error:  # when a peer dies, a rank may fail before Ray reports that
            if isinstance(error.cause, RunFailedError):  # what the ranks found together
                raise RunFailedError(str(error.cause)) from error

            # a disk that a rank cannot write to is nobody's death, nor is a user's mistake
            if (
                isinstance(error, OSError | ConfigError)
                or (rank := await self._dead_rank()) is None
            ):
                raise

            raise LearnerDownError(f"rank {rank} died") from error

    async def _dead_rank(self) -> int | None:
        """Returns the first rank that is known to be dead; None if all answer, or time is over."""
        pings = [asyncio.ensure_future(_begun(actor)) for actor in self._actors]
        try:
            done, _ = await asyncio.wait(
                pings, timeout=_REPORT_S, return_when=asyncio.FIRST_EXCEPTION
            )
        finally:
            for ping in pings:
                ping.cancel()

        dead = [rank for rank, ping in enumerate(pings) if ping in done and ping.exception()]
        return min(dead, default=None)


async def _begun(actor: ActorHandle) -> None:
    with dies_as(LearnerDownError):
        await actor.ping.remote()
