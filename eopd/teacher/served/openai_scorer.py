"""A teacher behind an unmodified OpenAI-style server: ``vllm serve``, or any that returns
``prompt_logprobs``.

In: a trajectory, sent as token ids in one ``/v1/completions`` request, so that no text is cut anew.
Out: the same signal as from our own engine, except that the entropy is bounded: a stock server
tells the top k and no more. vLLM always writes one token (``max_tokens`` 0 needs an echo of text),
which is thrown away, so its ``max_model_len`` must be one above prompt and response.

The form of the answer, as in vLLM 0.32.0: per prompt token a mapping from token id to ``{"logprob":
...}``, null for the first. It holds the token itself and the top k: k entries, or k + 1 where the
token is outside. Minus infinity is written -9999. Such requests never read the server's prefix
cache.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from pydantic import BaseModel

from eopd.config import ConfigError, ServerConfig, TeacherConfig
from eopd.teacher.base import whole_sequence
from eopd.teacher.served.base import ServedScorer
from eopd.teacher.served.bounds import entropy_bounds, tail_logprobs
from eopd.teacher.served.http import parse
from eopd.teacher.signal import SignalError, checked
from eopd.types import Int32Array, TeacherSignal

_MINUS_INFINITY: Final = -9999.0


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None  # vLLM's; other servers tell none


class _Models(BaseModel):
    data: list[_Model]


class _Logprob(BaseModel):
    logprob: float


PromptLogprobs = Sequence[Mapping[int, _Logprob] | None]


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _Logprob] | None]


class _Completion(BaseModel):
    choices: tuple[_Choice]


class OpenAITeacherScorer(ServedScorer):
    """One served model as a teacher. Make it with ``start``."""

    info_path = "/v1/models"

    def __init__(self, config: TeacherConfig, server: ServerConfig, *, top_k: int) -> None:
        super().__init__(config, server, top_k=top_k)
        assert server.model is not None, "the config of backend openai"
        self._served_model = server.model

    async def require_agreement(self, max_sequence_tokens: int) -> None:
        """Checks that the model is served, and to this length, and that the server scores.

        Raises:
            ConfigError: another model is served; K is above what the server allows; or it returns
                no prompt log-probabilities.
            TeacherDownError: no attempt reached the server.
        """
        try:
            listed = parse(_Models, await self._client.get(self.info_path))
            served = {model.id: model.max_model_len for model in listed.data}
            if self._served_model not in served:
                raise ConfigError(
                    f"teachers.server.model: {self._served_model} is not served there; "
                    f"{', '.join(served)} is"
                )

            longest = served[self._served_model]
            if longest is not None and longest <= max_sequence_tokens:
                raise ConfigError(
                    f"teachers.server: {self._served_model} is served up to {longest} "
                    "tokens; this run needs one above its longest prompt and response, "
                    f"{max_sequence_tokens + 1} (--max-model-len)"
                )

            token = np.zeros(1, np.int32)
            await self.signal(token, token)
        except SignalError as error:
            raise ConfigError(
                f"teachers.server: {self._name} cannot score with loss.top_k {self._top_k}: {error}"
            ) from None

    async def signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        """Asks the server; the entropy is known within bounds. A refusal or an answer of another
        form is a ``SignalError``.
        """
        token_ids = whole_sequence(self._vocab_size, prompt_ids, response_ids)
        request = {
            "model": self._served_model,
            "prompt": token_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self._top_k,
        }

        answer = await self._client.post("/v1/completions", json=request)
        logprobs = parse(_Completion, answer).choices[0].prompt_logprobs
        if len(logprobs) != len(token_ids):
            raise SignalError(f"{len(token_ids)} tokens were sent, {len(logprobs)} came back")

        return read_rows(
            logprobs[len(prompt_ids) :],
            response_ids,
            teacher=self._name,
            top_k=self._top_k,
            vocab_size=self._vocab_size,
        )


def read_rows(
    rows: PromptLogprobs, response_ids: Int32Array, *, teacher: str, top_k: int, vocab_size: int
) -> TeacherSignal:
    """Turn the server's mappings into a checked signal.

    Args:
        rows: R mappings from token id to log-probability: the token itself and the top k, in any
            order.
        response_ids: int32 [R].
        teacher: the teacher's name, carried along.
        top_k: K.
        vocab_size: V.

    Raises:
        SignalError: a row lacks its token or a candidate, has a value that is no log-probability,
            or is no distribution.
    """
    tokens, logprobs, ids = [], [], []
    for index, (row, token) in enumerate(zip(rows, response_ids.tolist(), strict=True)):
        where = f"row {index} of the signal"
        said = {token_id: entry.logprob for token_id, entry in (row or {}).items()}
        if token not in said:
            raise SignalError(f"{where} does not tell token {token}")

        if not all(_MINUS_INFINITY < logprob < 1.0 for logprob in said.values()):
            raise SignalError(f"{where} has a value that is not finite, or no log-probability")

        if max(said) >= vocab_size:
            raise SignalError(
                f"{where} names token {max(said)}, outside the vocabulary of {vocab_size}"
            )

        outside = len(said) == top_k + 1
        top = sorted(
            (-logprob, token_id)
            for token_id, logprob in said.items()
            if not (outside and token_id == token)
        )
        if len(top) != top_k or -top[-1][0] < (said[token] if outside else -math.inf):
            raise SignalError(
                f"{where} has {len(said)} entries that are not the top {top_k} and token {token}"
            )

        tokens.append(said[token])
        logprobs.append([-negative for negative, _ in top])
        ids.append([token_id for _, token_id in top])

    topk = np.array(logprobs, np.float32)

    return checked(
        TeacherSignal(
            teacher=teacher,
            token_logprobs=np.array(tokens, np.float32),
            entropy=entropy_bounds(topk, vocab_size),
            topk_ids=np.array(ids, np.int32),
            topk_logprobs=topk,
            tail_logprobs=tail_logprobs(topk, vocab_size),
        )
    )
