"""A teacher behind ``eopd teacher serve``: as exact as one in the cluster."""

import numpy as np

from eopd.config import ConfigError
from eopd.teacher.base import whole_sequence
from eopd.teacher.served import wire
from eopd.teacher.served.base import ServedScorer
from eopd.teacher.served.http import parse
from eopd.teacher.signal import SignalError
from eopd.types import Int32Array, TeacherSignal

_JSON = {"Content-Type": "application/json"}


class EopdTeacherScorer(ServedScorer):
    """One of our own servers as a teacher. Make it with ``start``."""

    info_path = wire.INFO_PATH

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Asks the server; a request that is refused, or answered with what is no signal, is a
        ``SignalError``.
        """
        whole_sequence(self._vocab_size, prompt_ids, response_ids)
        body = wire.encode_request(prompt_ids, response_ids)
        answer = await self._client.post(wire.SCORE_PATH, content=body, headers=_JSON)

        return wire.decode_answer(
            answer.content,
            teacher=self._name,
            num_response_tokens=len(response_ids),
            top_k=self._top_k,
        )

    async def require_agreement(self, max_sequence_tokens: int) -> None:
        """Compares the server's terms with ours, and lets it score.

        Raises:
            ConfigError: the key is wrong, this is no such server, or it serves something else.
            TeacherDownError: no attempt reached the server.
        """
        where = f"teachers.{self._name}.server"
        try:
            info = parse(wire.TeacherInfo, await self._client.get(self.info_path))
        except SignalError as error:
            raise ConfigError(
                f"{where}: is no teacher's server, or lets nobody in: {error}"
            ) from None

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
