"""The bytes of a scoring request and of its answer, both ends in this file: pure numpy, no server,
no client.

Everything is little-endian. A request, ``16 + 4 (P + R)`` bytes::

    offset      size        what
    0           4           magic, the letters EOPD
    4           1           version of this format, 1
    5           1           kind, 1: a request
    6           2           zero
    8           4           P, prompt tokens, uint32
    12          4           R, response tokens, uint32
    16          4 P         prompt token ids, int32
    16 + 4 P    4 R         response token ids, int32

An answer, ``16 + 4 R (3 + 2 K)`` bytes, so 140 a response token at K = 16::

    0           4           magic, the letters EOPD
    4           1           version of this format, 1
    5           1           kind, 2: an answer
    6           2           zero
    8           4           R, response tokens, uint32
    12          4           K, candidates per token, uint32
    16          4 R (3+2K)  R rows of 3 + 2 K float32

A row holds, in nats: the entropy over the whole vocabulary, the log-probability of the sampled
token, the log of the mass outside the top k (minus infinity where there is none), K
log-probabilities, most likely first, and then their K token ids. Ids are whole floats below 2^24,
and so exact; so is everything else, since no number is converted on the way. The layout of a row is
that of ``signal.py``, which also checks what arrives.

Left out: compression, since log-probabilities have none to give, and errors, which travel as JSON.
"""

import struct
from typing import Final

import numpy as np

from eopd.teacher.signal import num_columns, read_signal, write_signal
from eopd.types import Int32Array, TeacherSignal

VERSION: Final = 1
MEDIA_TYPE: Final = "application/vnd.eopd.score"

_HEADER: Final = struct.Struct("<4sBBHII")
_MAGIC: Final = b"EOPD"
_REQUEST: Final = 1
_ANSWER: Final = 2
_KINDS: Final = {_REQUEST: "a request", _ANSWER: "an answer"}


class WireError(ValueError):
    """Bytes that are no message of this format and version."""


def encode_request(prompt_ids: Int32Array, response_ids: Int32Array) -> bytes:
    """Token ids [P] and [R] to a request."""
    ids = np.concatenate((prompt_ids, response_ids)).astype("<i4")
    return (
        _HEADER.pack(_MAGIC, VERSION, _REQUEST, 0, len(prompt_ids), len(response_ids))
        + ids.tobytes()
    )


def decode_request(body: bytes) -> tuple[Int32Array, Int32Array]:
    """A request to token ids [P] and [R], which may be empty or outside any vocabulary.

    Raises:
        WireError: these bytes are no request, or not all of one.
    """
    num_prompt, num_response = _open(body, _REQUEST)
    _require_size(body, 4 * (num_prompt + num_response), f"{num_prompt} + {num_response} token ids")
    ids = np.frombuffer(body, "<i4", offset=_HEADER.size).astype(np.int32)
    return ids[:num_prompt], ids[num_prompt:]


def encode_answer(signal: TeacherSignal) -> bytes:
    """A signal with exact entropy to an answer; the teacher's name stays behind."""
    num_response, top_k = signal.topk_ids.shape
    return (
        _HEADER.pack(_MAGIC, VERSION, _ANSWER, 0, num_response, top_k)
        + write_signal(signal).astype("<f4").tobytes()
    )


def decode_answer(
    body: bytes, *, teacher: str, num_response_tokens: int, top_k: int
) -> TeacherSignal:
    """An answer to a signal, bit for bit the one that was encoded.

    Args:
        body: what arrived.
        teacher: the name the signal will carry.
        num_response_tokens: R, as it was asked for.
        top_k: K, as it was agreed on.

    Raises:
        WireError: these bytes are no answer, not all of one, or one to another request.
        SignalError: the rows are no distributions.
    """
    shape = _open(body, _ANSWER)
    if shape != (num_response_tokens, top_k):
        raise WireError(
            f"an answer about {shape[0]} tokens with {shape[1]} candidates; expected "
            f"{num_response_tokens} and {top_k}"
        )

    columns = num_columns(top_k)
    _require_size(
        body, 4 * num_response_tokens * columns, f"{num_response_tokens} rows of {columns} float32"
    )
    raw = (
        np.frombuffer(body, "<f4", offset=_HEADER.size)
        .astype(np.float32)
        .reshape(num_response_tokens, columns)
    )

    return read_signal(raw, teacher=teacher, num_response_tokens=num_response_tokens, top_k=top_k)


def _open(body: bytes, kind: int) -> tuple[int, int]:
    """The two counts of a header that is of this version and kind."""
    if len(body) < _HEADER.size:
        raise WireError(f"{len(body)} bytes are too few for a header of {_HEADER.size}")

    magic, version, found, zero, first, second = _HEADER.unpack_from(body)
    if magic != _MAGIC:
        raise WireError(f"bytes that begin with {magic!r} are not of this format ({_MAGIC!r})")

    if version != VERSION:
        raise WireError(f"version {version} of the format; this end speaks {VERSION}")

    if found != kind or zero:
        raise WireError(
            f"kind {found} with flags {zero}; expected {_KINDS[kind]}: kind {kind} with flags 0"
        )

    return first, second


def _require_size(body: bytes, size: int, what: str) -> None:
    if len(body) != _HEADER.size + size:
        raise WireError(f"{what} take {_HEADER.size + size} bytes; there are {len(body)}")
