"""The student's words for the teacher, and the teacher's for the student: end tokens mapped both
ways, pure numpy.

A base student ends a response with its own token, a chat teacher expects another. ``remap`` is
``{student end id: teacher end id}``, one to one. In the teacher's copy of a response the terminal end token
becomes the teacher's, or the teacher would call every stop impossible; in its signal the teacher's
end token becomes the student's, or forward KL would raise a token on which the student does not
stop. (The first half is Jin et al.'s, arXiv 2603.07079; the second follows.)

A teacher's head may also have more rows than the student's. Rows that name no token are padding,
and padding is part of "anything else".

Example: remap ``{0: 2}``. A response ``[7, 8, 0]`` that ended by itself is scored as ``[7, 8, 2]``;
candidates ``[2, 9, 0]`` of probability ``[.5, .3, .1]`` come back as ``[0, 9, -]`` of ``[.6, .3,
0]``, tail .1.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from eopd.types import Float32Array, Int32Array, StopReason, TeacherSignal


def to_teacher(
    response_ids: Int32Array, stop_reason: StopReason, remap: Mapping[int, int]
) -> Int32Array:
    """The response as the teacher reads it.

    Only the last token of a response that ended by itself is replaced; one that was cut has no end
    token, and gets none.

    Args:
        response_ids: [R], left as they are.
        stop_reason: why the response ended.
        remap: ``{student end id: teacher end id}``.
    """
    if stop_reason is not StopReason.END_TOKEN or int(response_ids[-1]) not in remap:
        return response_ids

    copy = response_ids.copy()
    copy[-1] = remap[int(response_ids[-1])]
    return copy


def to_student(
    signal: TeacherSignal, response_ids: Int32Array, remap: Mapping[int, int], *, num_tokens: int
) -> TeacherSignal:
    """The signal in the student's vocabulary; candidates and tail still add up to one.

    * Candidates: at every position a teacher's end id becomes the student's. Where both were
      candidates, the slot of the likelier one holds the sum and the other is freed: log-probability
      -inf, which the loss ignores, whatever its id. A candidate that names no token is freed too,
      and its probability joins the tail. Freed slots come last.
    * Tail: what was in it stays. So where only one of the two end ids is a candidate, the other
      one's probability (at most that of the last candidate) still counts as "anything else".
    * Entropy: the teacher's own, over its own tokens. That is exact unless both end ids have mass;
      the student's two stops being one would lower it by at most log 2 times that mass.
    * Sampled token: a student's end token has the probability of its slot where it is a candidate,
      so that both KL terms speak of one number. A teacher's end token on which the student went on
      has given its probability away: it counts as one outside the candidates, no likelier than the
      tail and the last of them. (Its own probability would reward the student for a stop that is
      none.)

    Args:
        signal: as ``read_signal`` gives it: candidates sorted, ids distinct.
        response_ids: [R], the student's, not the teacher's copy.
        remap: ``{student end id: teacher end id}``.
        num_tokens: ids from here on name no token.
    """
    back = {theirs: own for own, theirs in remap.items()}
    padding_RK = signal.topk_ids >= num_tokens
    if not (back or padding_RK.any()):
        return signal

    logprobs_RK = signal.topk_logprobs.astype(np.float64)
    padded_R = np.logaddexp.reduce(np.where(padding_RK, logprobs_RK, -np.inf), axis=1)
    tail_R = np.logaddexp(signal.tail_logprobs, padded_R).astype(np.float32)
    logprobs_RK[padding_RK] = -np.inf
    ids_RK = signal.topk_ids.copy()
    for theirs, own in back.items():
        ids_RK[signal.topk_ids == theirs] = own

    for own in remap:
        _merge(logprobs_RK, ids_RK == own)

    order_RK = np.argsort(-logprobs_RK, axis=1, kind="stable")
    renamed = replace(
        signal,
        topk_ids=np.take_along_axis(ids_RK, order_RK, axis=1),
        topk_logprobs=np.take_along_axis(logprobs_RK, order_RK, axis=1).astype(np.float32),
        tail_logprobs=tail_R,
    )

    return replace(renamed, token_logprobs=_token_logprobs(renamed, response_ids, remap))


def _merge(logprobs_RK: np.ndarray, same_RK: np.ndarray) -> None:
    """Add up, in the first of them, candidates that have become the same; in place."""
    rows = np.flatnonzero(same_RK.sum(axis=1) == 2)
    first, last = (
        same_RK[rows].argmax(axis=1),
        same_RK.shape[1] - 1 - same_RK[rows, ::-1].argmax(axis=1),
    )
    logprobs_RK[rows, first] = np.logaddexp(logprobs_RK[rows, first], logprobs_RK[rows, last])
    logprobs_RK[rows, last] = -np.inf


def _token_logprobs(
    renamed: TeacherSignal, response_ids: Int32Array, remap: Mapping[int, int]
) -> Float32Array:
    """Returns the log-probabilities of the sampled tokens, [R]; all but end tokens keep theirs."""
    slots_RK = np.where(
        renamed.topk_ids == response_ids[:, None],
        renamed.topk_logprobs,
        -np.inf,
    )
    slot_R = slots_RK.max(axis=1)
    known_RK = renamed.topk_logprobs > -np.inf
    outside_R = np.where(known_RK, renamed.topk_logprobs, np.inf).min(axis=1)
    outside_R = np.where(
        renamed.tail_logprobs > -np.inf, np.minimum(outside_R, renamed.tail_logprobs), outside_R
    )
    own_R = np.isin(response_ids, list(remap)) & (slot_R > -np.inf)
    given_away_R = np.isin(response_ids, [token for token in remap.values() if token not in remap])
    logprobs_R = np.where(own_R, slot_R, renamed.token_logprobs)
    logprobs_R = np.where(given_away_R, np.minimum(logprobs_R, outside_R), logprobs_R)

    return logprobs_R.astype(np.float32)
