"""What the driver calls on the two ends of the wire during a weight sync (``channel.py``)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from eopd.types import Float32Array, Int32Array, PolicyVersion


class SenderLink(Protocol):
    """The learner gang's ``WeightSender``, seen from the driver."""

    def reserved(self) -> AbstractAsyncContextManager[object]: ...  # noqa: D102 - no step comes between its calls
    async def version(self) -> PolicyVersion: ...  # noqa: D102
    async def open(self, engines: int, secret: str) -> Sequence[Mapping[str, object]]: ...  # noqa: D102
    async def accept(self) -> None: ...  # noqa: D102
    async def send(self) -> int: ...  # noqa: D102
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102


class EngineLink(Protocol):
    """A rollout engine's weight calls, seen from the driver (``rollout/vllm_engine.py``)."""

    async def connect_weights(self, init_info: Mapping[str, object]) -> None: ...  # noqa: D102
    async def begin_weights(self) -> None: ...  # noqa: D102
    async def check_weights(self) -> None: ...  # noqa: D102
    async def install_weights(self, version: PolicyVersion) -> float: ...  # noqa: D102
    async def probe(self, token_ids: Int32Array) -> Float32Array: ...  # noqa: D102
    async def version(self) -> PolicyVersion: ...  # noqa: D102
