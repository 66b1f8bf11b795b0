"""The bytes that leave a process: bodies of trajectories through the object store, weights to the
engines, and checkpoints to the disk.
"""

import math
from dataclasses import dataclass
from typing import Final

from eopd.config import Config
from eopd.planning.architecture import Architecture
from eopd.planning.needs import (
    Hardware,
    checkpoint_bytes,
    checkpoints_at_a_time,
    sync_bytes,
    wire_of,
)

# Of a response token (``types.py``): id, mask, log-probability and policy version; then the teacher's
# log-probability, entropy and tail; then id and log-probability of each candidate.
_OF_ROLLOUT: Final = 4 + 1 + 4 + 4
_OF_TEACHER: Final = 4 + 4 + 4
_OF_CANDIDATE: Final = 4 + 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What travels. ``body_bytes`` is a scored trajectory of full length, ``batch_bytes`` a batch of
    them; ``in_flight_bytes`` all that may be admitted and not yet published. ``sync_s`` is None where
    no network carries the weights, or its bandwidth is not known. ``checkpoint_bytes`` is what one
    checkpoint takes at least, of which ``checkpoints`` lie on disk at a time.
    """

    body_bytes: int
    batch_bytes: int
    slots: int
    in_flight_bytes: int
    wire: str
    sync_bytes: int
    sync_s: float | None
    checkpoint_bytes: int
    checkpoints: int


def traffic_of(config: Config, model: Architecture, hardware: Hardware) -> Traffic:
    """Returns what travels in a step, where every prompt and response has its full length.

    The buffer has batch x (1 + max_staleness - lookahead) slots (``buffer.py``). Weights go over gloo
    along a binary tree, so that the sender's link carries them ceil(log2(members)) times, and over
    nccl once, since its members pass on what they receive.
    """
    flow = config.flow
    of_token = _OF_ROLLOUT + _OF_TEACHER + _OF_CANDIDATE * config.loss.top_k
    of_teacher = max((teacher.max_prompt_tokens or 0) for teacher in config.teachers)
    prompts = 4 * (config.prompts.max_tokens + of_teacher)
    body = prompts + of_token * config.rollout.max_response_tokens
    slots = config.batch_trajectories * (1 + flow.max_staleness - flow.lookahead)

    wire, size = wire_of(config, hardware), sync_bytes(config, model)
    seconds = None
    if wire != "shared" and hardware.bandwidth is not None:
        members = 1 + config.rollout.engines
        rounds = math.ceil(math.log2(members)) if wire == "gloo" else 1
        seconds = rounds * size / hardware.bandwidth

    return Traffic(
        body_bytes=body,
        batch_bytes=body * config.batch_trajectories,
        slots=slots,
        in_flight_bytes=body * slots,
        wire=wire,
        sync_bytes=size,
        sync_s=seconds,
        checkpoint_bytes=checkpoint_bytes(config, model.parameters),
        checkpoints=checkpoints_at_a_time(config),
    )
