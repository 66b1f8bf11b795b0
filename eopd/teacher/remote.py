"""A teacher behind an unmodified OpenAI-style server: ``vllm serve``, or any that returns ``prompt_logprobs``.

In: a trajectory, sent as token ids in one ``/v1/completions`` request, so that no text is cut anew. Out: the same
signal as from our own engine, except that the entropy is bounded: a stock server tells the top k and no more.
vLLM always writes one token (``max_tokens`` 0 needs an echo of text), which is thrown away, so its ``max_model_len``
must be one above prompt and response.

The form of the answer, as in vLLM 0.32.0: per prompt token a mapping from token id to ``{"logprob": ...}``, null for
the first. It holds the token itself and the top k: k entries, or k + 1 where the token is outside. Minus infinity is
written -9999. Such requests never read the server's prefix cache.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Self, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ValidationError

from eopd.config import ConfigError, TeacherConfig
from eopd.teacher.bounds import entropy_bounds, tail_logprobs
from eopd.teacher.http import ServerClient, TeacherRefusedError, TeacherUnavailableError
from eopd.teacher.signal import SignalError, read_signal
from eopd.teacher.vocabulary import vocab_size
from eopd.types import (
    Bounds,
    Int32Array,
    LossReason,
    LostTrajectory,
    ScoredTrajectory,
    Stored,
    TeacherSignal,
    Trajectory,
)

_MINUS_INFINITY: Final = -9999.0


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Logprob(BaseModel):
    logprob: float


PromptLogprobs = Sequence[Mapping[int, _Logprob] | None]


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _Logprob] | None]


class _Completion(BaseModel):
    choices: tuple[_Choice]


Answer = TypeVar("Answer", bound=BaseModel)


class OpenAITeacherScorer:
    """One served model as a teacher. Make it with ``start``; ``score`` is safe to call concurrently."""

    def __init__(self, client: ServerClient, *, served_model: str, name: str, top_k: int, vocab_size: int) -> None:
        self._client = client
        self._served_model = served_model
        self._name = name
        self._top_k = top_k
        self._vocab_size = vocab_size

    @classmethod
    async def start(cls, config: TeacherConfig, *, top_k: int) -> Self:
        """Ask the server what it serves and score one made-up token, so that a scorer that is there works.

        Args:
            config: the teacher; ``model`` is the directory whose ``config.json`` tells V.
            top_k: K, candidates per response token.

        Raises:
            ConfigError: the key is missing; another model is served; K is above V, or above what the server allows;
                or it returns no prompt log-probabilities.
            TeacherUnavailableError: no attempt reached the server.
        """
        assert config.server is not None and config.server.model is not None, "the config of backend openai"
        size = vocab_size(config.model)
        if top_k > size:
            raise ConfigError(f"loss.top_k {top_k} is above the vocabulary of {size} of teacher {config.name}")
        client = ServerClient(config.server)
        scorer = cls(client, served_model=config.server.model, name=config.name, top_k=top_k, vocab_size=size)
        try:
            await scorer._require_working()
        except BaseException:
            await client.close()
            raise
        return scorer

    async def score(self, stored: Stored[Trajectory]) -> Stored[ScoredTrajectory] | LostTrajectory:
        """Score one trajectory, whose body is the ``Trajectory`` itself.

        Returns:
            The scored trajectory, its entropy within ``Bounds``; its header's sums gain ``score_s`` (seconds, waiting
            included), ``teacher_logprob``, and ``teacher_entropy`` (nats, summed over response tokens; the middle of
            the bounds). A request that is refused, stays unanswered through all attempts, or brings no distribution is
            a ``LostTrajectory``.
        """
        started = time.monotonic()
        trajectory = cast(Trajectory, stored.body)
        try:
            signal = await self._signal(trajectory.prompt.token_ids, trajectory.response_ids)
        except (TeacherUnavailableError, TeacherRefusedError, SignalError) as error:
            return LostTrajectory(key=stored.header.key, reason=LossReason.TEACHER_FAILED, detail=str(error))
        entropy = cast(Bounds, signal.entropy)
        gained = {
            "score_s": time.monotonic() - started,
            "teacher_logprob": float(signal.token_logprobs.sum(dtype=np.float64)),
            "teacher_entropy": float((entropy.low + entropy.high).sum(dtype=np.float64)) / 2.0,
        }
        header = replace(stored.header, sums={**stored.header.sums, **gained})
        return Stored(header, ScoredTrajectory(trajectory=trajectory, signal=signal))

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        await self._client.close()

    async def _require_working(self) -> None:
        try:
            listed = _parse(_Models, (await self._client.get("/v1/models")).content, self._name)
            served = [model.id for model in listed.data]
            if self._served_model not in served:
                raise ConfigError(
                    f"teachers.server.model: {self._served_model} is not served there; {', '.join(served)} is"
                )
            token = np.zeros(1, np.int32)
            await self._signal(token, token)
        except (TeacherRefusedError, SignalError) as error:
            raise ConfigError(
                f"teachers.server: {self._name} cannot score with loss.top_k {self._top_k}: {error}"
            ) from None

    async def _signal(self, prompt_ids: Int32Array, response_ids: Int32Array) -> TeacherSignal:
        token_ids = np.concatenate((prompt_ids, response_ids))
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise SignalError(
                f"teacher {self._name}: token id {token_ids.max()} is outside its vocabulary of {self._vocab_size}"
            )
        request = {
            "model": self._served_model,
            "prompt": token_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self._top_k,
        }
        answer = await self._client.post("/v1/completions", json=request)
        logprobs = _parse(_Completion, answer.content, self._name).choices[0].prompt_logprobs
        if len(logprobs) != len(token_ids):
            raise SignalError(f"teacher {self._name}: {len(token_ids)} tokens were sent, {len(logprobs)} came back")
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
        rows: R mappings from token id to log-probability: the token itself and the top k, in any order.
        response_ids: int32 [R].
        teacher: the teacher's name, carried along.
        top_k: K.
        vocab_size: V.

    Raises:
        SignalError: a row lacks its token or a candidate, has a value that is no log-probability, or is no
            distribution.
    """
    tokens, logprobs, ids = [], [], []
    for index, (row, token) in enumerate(zip(rows, response_ids.tolist(), strict=True)):
        where = f"teacher {teacher}: row {index} of the signal"
        said = {token_id: entry.logprob for token_id, entry in (row or {}).items()}
        if token not in said:
            raise SignalError(f"{where} does not tell token {token}")
        if not all(_MINUS_INFINITY < logprob < 1.0 for logprob in said.values()):
            raise SignalError(f"{where} has a value that is not finite, or no log-probability")
        if max(said) >= vocab_size:
            raise SignalError(f"{where} names token {max(said)}, outside the vocabulary of {vocab_size}")
        outside = len(said) == top_k + 1
        top = sorted((-logprob, token_id) for token_id, logprob in said.items() if not (outside and token_id == token))
        if len(top) != top_k or -top[-1][0] < (said[token] if outside else -math.inf):
            raise SignalError(f"{where} has {len(said)} entries that are not the top {top_k} and token {token}")
        tokens.append(said[token])
        logprobs.append([-negative for negative, _ in top])
        ids.append([token_id for _, token_id in top])
    topk = np.array(logprobs, np.float32)
    bounds = entropy_bounds(topk, vocab_size)
    raw = np.column_stack((bounds.low, tokens, tail_logprobs(topk, vocab_size), topk, ids)).astype(np.float32)
    signal = read_signal(raw, teacher=teacher, num_response_tokens=len(response_ids), top_k=top_k)
    return replace(signal, entropy=bounds)


def _parse(form: type[Answer], content: bytes, teacher: str) -> Answer:
    try:
        return form.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SignalError(f"teacher {teacher}: unexpected answer of the server, at {place}: {first['msg']}") from None
