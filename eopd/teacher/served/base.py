"""What teachers behind a server have in common, a stock one or ours: a client, and a first question
whose answer says whether the server can teach this run.
"""

from abc import abstractmethod
from typing import ClassVar, Self

from eopd.config import ServerConfig, TeacherConfig
from eopd.hub import model_directory
from eopd.teacher.base import SignalScorer
from eopd.teacher.served.http import ServerClient
from eopd.tokenizer import vocab_size


class ServedScorer(SignalScorer):
    """A teacher behind a server, which goes on when the scorer is closed. Make it with ``start``."""

    info_path: ClassVar[str]  # where the server tells what it serves

    def __init__(self, config: TeacherConfig, server: ServerConfig, *, top_k: int) -> None:
        size = vocab_size(model_directory(config.model))
        super().__init__(config, top_k=top_k, vocab_size=size)
        self._client = ServerClient(server)

    @classmethod
    async def start(cls, config: TeacherConfig, *, top_k: int, max_sequence_tokens: int) -> Self:
        """Asks the server what it serves, and lets it score one made-up token, so that a scorer that
        is there works.

        Args:
            config: the teacher; ``model`` is the directory whose ``config.json`` tells V.
            top_k: K, candidates per response token.
            max_sequence_tokens: the longest prompt and response together.

        Raises:
            ConfigError: the key is missing or wrong, or this is no such server, or it serves
                something else, or it cannot score.
            TeacherDownError: no attempt reached the server.
        """
        assert config.server is not None, "the config of a teacher behind a server"
        scorer = cls(config, config.server, top_k=top_k)

        try:
            await scorer.require_agreement(max_sequence_tokens)
        except BaseException:
            await scorer.close()
            raise

        return scorer

    @abstractmethod
    async def require_agreement(self, max_sequence_tokens: int) -> None:
        """Checks that the server serves what this run needs; raises as ``start``."""

    @property
    def seats(self) -> int:
        """The number of connections: one trajectory on each."""
        return self._client.max_connections

    async def ping(self) -> None:
        """Returns when the server answers."""
        await self._client.get(self.info_path)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()
