"""What travels between the server of a teacher and its clients: both ends in this file.

    GET  /v1/teacher          TeacherInfo, JSON
    POST /v1/teacher/score    ScoreRequest, JSON  ->  a signal, safetensors

The tensors of a signal, in nats, at the teacher's temperature: ``token_logprobs`` [R], ``entropy``
[R], ``topk_ids`` [R, K] (int32, most likely first), ``topk_logprobs`` [R, K] and ``tail_logprobs``
[R] (minus infinity where there is no mass outside the top k). All but the ids are float32, bit for
bit as the engine computed them. That is 12 + 8 K bytes for each response token: 140 at K = 16.
"""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from eopd.teacher.signal import SignalError, checked
from eopd.types import Exact, Int32Array, TeacherSignal

INFO_PATH: Final = "/v1/teacher"
SCORE_PATH: Final = "/v1/teacher/score"
MEDIA_TYPE: Final = "application/vnd.safetensors"
VERSION: Final = 2


class TeacherInfo(BaseModel):
    """What a client must know before it asks."""

    name: str
    top_k: int
    vocab_size: int
    temperature: float
    max_sequence_tokens: int
    wire_version: int = VERSION


TokenId = Annotated[int, Field(strict=True, ge=0)]


class ScoreRequest(BaseModel):
    """A prompt and its response."""

    model_config = ConfigDict(extra="forbid")

    prompt_ids: list[TokenId] = Field(min_length=1)
    response_ids: list[TokenId] = Field(min_length=1)


def encode_request(prompt_ids: Int32Array, response_ids: Int32Array) -> bytes:
    """Returns the JSON of a request about token ids [P] and [R]."""
    asked = ScoreRequest(prompt_ids=prompt_ids.tolist(), response_ids=response_ids.tolist())
    return asked.model_dump_json().encode()


def encode_answer(signal: TeacherSignal) -> bytes:
    """Returns the safetensors of a signal; the teacher's name is not among them.

    Raises:
        TypeError: the entropy is known only within bounds.
    """
    if not isinstance(signal.entropy, Exact):
        raise TypeError(f"teacher {signal.teacher}: a signal with entropy bounds does not travel")

    body: bytes = save(
        {
            "token_logprobs": signal.token_logprobs,
            "entropy": signal.entropy.entropy,
            "topk_ids": signal.topk_ids,
            "topk_logprobs": signal.topk_logprobs,
            "tail_logprobs": signal.tail_logprobs,
        }
    )

    return body


def decode_answer(
    body: bytes, *, teacher: str, num_response_tokens: int, top_k: int
) -> TeacherSignal:
    """Returns the signal in an answer, bit for bit the one that was encoded.

    Args:
        body: what arrived.
        teacher: the name the signal will carry.
        num_response_tokens: R, as it was asked for.
        top_k: K, as it was agreed on.

    Raises:
        SignalError: these bytes are no answer, one to another request, or no distributions.
    """
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SignalError(f"the answer is no safetensors: {error}") from None

    one_number, candidates = (num_response_tokens,), (num_response_tokens, top_k)
    expected = {
        "token_logprobs": ("float32", one_number),
        "entropy": ("float32", one_number),
        "topk_ids": ("int32", candidates),
        "topk_logprobs": ("float32", candidates),
        "tail_logprobs": ("float32", one_number),
    }
    received = {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    if received != expected:
        raise SignalError(f"the answer holds {received}; {expected} was expected")

    entropy = Exact(tensors.pop("entropy"))
    return checked(TeacherSignal(teacher=teacher, entropy=entropy, **tensors))
