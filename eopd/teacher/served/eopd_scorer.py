"""A teacher behind ``eopd teacher serve``: as exact as one in the cluster."""

from typing import Self

import numpy as np
from pydantic import ValidationError

from eopd.config import ConfigError, TeacherConfig
from eopd.hub import model_directory
from eopd.teacher.base import SignalScorer, whole_sequence
from eopd.teacher.served import wire
from eopd.teacher.served.http import ServerClient, TeacherRefusedError, explain
from eopd.teacher.signal import SignalError
from eopd.tokenizer import vocab_size
from eopd.types import Int32Array, TeacherSignal

_JSON = {"Content-Type": "application/json"}


class EopdTeacherScorer(SignalScorer):
    """One of our own servers as a teacher. Make it with ``start``."""

    def __init__(self, client: ServerClient, config: TeacherConfig, *, top_k: int) -> None:
        size = vocab_size(model_directory(config.model))
        super().__init__(config, top_k=top_k, vocab_size=size)
        self._client = client

    @classmethod
    async def start(cls, config: TeacherConfig, *, top_k: int, max_sequence_tokens: int) -> Self:
        """Compare the server's terms with ours, and score one made-up token.

        Raises:
            ConfigError: the key is missing or wrong, this is no such server, or it serves something
                else.
            TeacherUnavailableError: no attempt reached the server.
        """
        assert config.server is not None, "the config of backend eopd"
        client = ServerClient(config.server)
        scorer = cls(client, config, top_k=top_k)

        try:
            await scorer._require_agreement(max_sequence_tokens)
        except BaseException:
            await client.close()
            raise

        return scorer

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Asks the server; a request that is refused, or answered with what is no signal, is a
        ``SignalError``.
        """
        whole_sequence(self._name, self._vocab_size, prompt_ids, response_ids)
        body = wire.encode_request(prompt_ids, response_ids)

        try:
            answer = await self._client.post(wire.SCORE_PATH, content=body, headers=_JSON)
        except TeacherRefusedError as error:
            raise SignalError(f"teacher {self._name}: {error}") from error

        return wire.decode_answer(
            answer.content,
            teacher=self._name,
            num_response_tokens=len(response_ids),
            top_k=self._top_k,
        )

    @property
    def seats(self) -> int:
        """The number of connections: one trajectory on each."""
        return self._client.max_connections

    async def ping(self) -> None:
        """Returns when the server answers."""
        await self._client.get(wire.INFO_PATH)

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        await self._client.close()

    async def _require_agreement(self, max_sequence_tokens: int) -> None:
        where = f"teachers.{self._name}.server"
        try:
            answer = await self._client.get(wire.INFO_PATH)
            info = wire.TeacherInfo.model_validate_json(answer.content)
        except TeacherRefusedError as error:
            raise ConfigError(
                f"{where}: is no teacher's server, or lets nobody in: {error}"
            ) from None
        except ValidationError as error:
            raise ConfigError(f"{where}: is no teacher's server: {explain(error)}") from None

        ours = {
            "top_k": self._top_k,
            "vocab_size": self._vocab_size,
            "temperature": self._config.temperature,
            "wire_version": wire.VERSION,
        }
        for name, wanted in ours.items():
            if (found := getattr(info, name)) != wanted:
                raise ConfigError(f"{where}: has {name} {found}, this run needs {wanted}")

        if info.max_sequence_tokens < max_sequence_tokens:
            raise ConfigError(
                f"{where}: takes sequences of {info.max_sequence_tokens} tokens, this run's "
                f"have {max_sequence_tokens}"
            )

        token = np.zeros(1, np.int32)

        try:
            await self.signal(token, token)
        except SignalError as error:
            raise ConfigError(f"{where}: cannot score: {error}") from None
