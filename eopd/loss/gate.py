"""The gate of each token, g in [0, 1]: how much forward KL it gets, from the teacher's entropy.

No gate depends on how a batch is cut: ``quantile`` has a threshold over the loss tokens of all ranks,
and ``random`` has draws that depend on a token's trajectory and position alone. ``custom`` is a
function of the user, which sees one trajectory at a time.
"""

import hashlib
from dataclasses import fields, replace
from typing import assert_never

import torch
from torch import Tensor

from eopd.config.loss import (
    AlwaysGate,
    CustomGate,
    Gate,
    HardGate,
    NeverGate,
    QuantileGate,
    RandomGate,
    SigmoidGate,
)
from eopd.plugins import GateFunction, GateTokens, cause_of, load
from eopd.types import RunFailedError, TrajectoryKey


class GateError(RunFailedError):
    """A user's gate raised, or gave something that is no gate. The message names it."""


def gate_weights(
    entropy_T: Tensor, gate: Gate, *, threshold: float | None = None, draws_T: Tensor | None = None
) -> Tensor:
    """Computes the gate of every token.

    Args:
        entropy_T: teacher entropy in nats.
        gate: which gate, and its options.
        threshold: for ``quantile``, the ``quantile_threshold`` of the batch of all ranks.
        draws_T: for ``random``, uniform in [0, 1), one ``random_draws`` per trajectory.

    Returns:
        gate_T in [0, 1], float32.

    Raises:
        ValueError: ``quantile`` without a threshold, ``random`` without draws, or ``custom``.
    """
    match gate:
        case HardGate():
            return (entropy_T > gate.tau).float()
        case QuantileGate():
            if threshold is None:
                raise ValueError("the quantile gate needs the threshold of the whole batch")

            return (entropy_T >= threshold).float()
        case SigmoidGate():
            return torch.sigmoid((entropy_T - gate.tau) / gate.scale).float()
        case RandomGate():
            if draws_T is None:
                raise ValueError("the random gate needs one draw per token")

            return (draws_T < gate.rate).float()
        case AlwaysGate():
            return torch.ones_like(entropy_T, dtype=torch.float32)
        case NeverGate():
            return torch.zeros_like(entropy_T, dtype=torch.float32)
        case CustomGate():
            raise ValueError("the custom gate reads more than entropies: see custom_gate")
        case _:
            assert_never(gate)


def load_gate(gate: CustomGate) -> GateFunction:
    """Returns a user's function, with its options.

    Raises:
        ConfigError: it cannot be loaded.
    """
    return load("loss.gate.function", gate.function, GateFunction, gate.options)


def custom_gate(name: str, function: GateFunction, tokens: GateTokens, counted_R: Tensor) -> Tensor:
    """Asks a user's function for the gate of one trajectory.

    Args:
        name: the function's import path, for messages.
        function: the function, with its options.
        tokens: what it reads.
        counted_R: bool, the tokens whose numbers are finite. At any other the gate is 0, whatever
            the function says.

    Returns:
        gate_R in [0, 1], float32, detached and on the CPU.

    Raises:
        GateError: the function raised, or returned no tensor [R] of numbers from 0 to 1.
    """
    name, num_tokens = f"loss.gate.function: {name}", len(counted_R)
    columns = {field.name: getattr(tokens, field.name).clone() for field in fields(tokens)}
    try:
        gate_R = function(replace(tokens, **columns))  # it may work in place
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function raises what it likes
        raise GateError(f"{name}: {cause_of(error)}") from None

    if not isinstance(gate_R, Tensor):
        raise GateError(f"{name}: returned {type(gate_R).__name__}; it must be a tensor of floats")

    if gate_R.shape != (num_tokens,):
        raise GateError(
            f"{name}: returned a tensor of {list(gate_R.shape)} for {num_tokens} tokens; it must "
            f"be of [{num_tokens}]"
        )

    gate_R = gate_R.detach().float().cpu().where(counted_R, 0.0)
    if not gate_R.isfinite().all():
        raise GateError(f"{name}: returned what is no finite number")

    low, high = (gate_R.min().item(), gate_R.max().item()) if num_tokens else (0.0, 0.0)
    if low < 0.0 or high > 1.0:
        raise GateError(f"{name}: returned {low:g} to {high:g}; a gate is from 0 to 1")

    return gate_R


def quantile_threshold(entropies_N: Tensor, top: float) -> float:
    """Returns the entropy that opens the gate for a share ``top`` of the N loss tokens of a batch,
    in nats.

    It is the round(top N)-th largest entropy (at least the largest), and the gate is open at it:
    tokens tied with it open too. ``[0.1, 2.0, 0.5, 1.0]`` with top 0.5 gives 1.0. A batch without
    loss tokens gives infinity.
    """
    if entropies_N.numel() == 0:
        return float("inf")

    count = max(1, round(top * entropies_N.numel()))
    return entropies_N.kthvalue(entropies_N.numel() - count + 1).values.item()


def random_draws(seed: int, key: TrajectoryKey, num_tokens: int) -> Tensor:
    """Draws uniform numbers in [0, 1), float64 [R], for the tokens of one trajectory.

    They depend on (seed, key, response position) alone: another batch order, packing or number of
    ranks gives the same draws.
    """
    name = f"{seed}\n{key.epoch}\n{key.sample_index}\n{key.prompt_id}"
    # An extendable hash: position r owns bytes 8 r to 8 r + 8, however long the response is.
    digest = bytearray(hashlib.shake_128(name.encode()).digest(8 * num_tokens))
    bits = (
        torch.frombuffer(digest, dtype=torch.int64) if digest else torch.empty(0, dtype=torch.int64)
    )
    return (bits & (2**53 - 1)).double() * 2.0**-53
