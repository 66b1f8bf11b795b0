"""The learner's oracle: plain torch on dense logits, which knows neither packing nor
DeepSpeed nor chunks.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.types import ScoredTrajectory


def dense_logprobs(model: Any, scored: ScoredTrajectory, temperature: float) -> Tensor:
    """The student's log-probabilities [R, V], from a run of this trajectory alone."""
    prompt = scored.trajectory.prompt.token_ids
    response = scored.trajectory.response_ids
    sequence = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = model(input_ids=sequence).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def sampled(logprobs: Tensor, scored: ScoredTrajectory) -> Tensor:
    return logprobs[range(len(logprobs)), scored.trajectory.response_ids]


def token_losses(
    logprobs: Tensor, old: Tensor, scored: ScoredTrajectory, gate: Tensor, config: LossConfig
) -> Tensor:
    """METHOD: w max(-A r, -A clip(r)) + alpha g FKL, for every response token."""
    signal = scored.signal
    ratio = (sampled(logprobs, scored) - old).exp()
    advantage = torch.tensor(signal.token_logprobs) - old
    weight = (
        (old - torch.tensor(scored.trajectory.rollout_logprobs))
        .exp()
        .clamp(max=config.reverse_kl.importance_cap)
    )
    clip = config.reverse_kl.clip
    reverse = weight * torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    )
    ids = torch.tensor(signal.topk_ids).long()
    top = torch.tensor(signal.topk_logprobs).to(logprobs.dtype)
    student_top = logprobs.gather(1, ids)
    if config.forward_kl.kind == "renormalized":
        top = top.log_softmax(-1)
        forward = (top.exp() * (top - student_top)).sum(-1)
    else:
        rest = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)
        teacher_rest = torch.tensor(signal.tail_logprobs)
        forward = (top.exp() * (top - student_top)).sum(-1) + teacher_rest.exp() * (
            teacher_rest - rest
        )

    return reverse + config.alpha * gate * forward


def gates_of(batch: Sequence[ScoredTrajectory], config: LossConfig, *, seed: int) -> list[Tensor]:
    """The gate [R] of every trajectory of a whole batch."""
    gate = config.gate
    entropies = [torch.tensor(scored.signal.entropy.entropy) for scored in batch]

    match gate.kind:
        case "hard":
            return [(entropy > gate.tau).float() for entropy in entropies]
        case "quantile":
            masks = [torch.tensor(scored.trajectory.loss_mask) for scored in batch]
            pooled = (
                torch.cat([e[mask] for e, mask in zip(entropies, masks, strict=True)])
                .sort(descending=True)
                .values
            )
            threshold = pooled[round(gate.top * len(pooled)) - 1]
            return [(entropy >= threshold).float() for entropy in entropies]
        case "sigmoid":
            return [1 / (1 + (-(entropy - gate.tau) / gate.scale).exp()) for entropy in entropies]
        case "random":
            found = []
            for scored in batch:
                chosen = [draw < gate.rate for draw in draws(scored, seed)]
                found.append(torch.tensor(chosen).float())

            return found
        case "always" | "never":
            return [torch.full_like(entropy, gate.kind == "always") for entropy in entropies]

    raise AssertionError(gate.kind)


def draws(scored: ScoredTrajectory, seed: int) -> list[float]:
    """Uniform in [0, 1): 53 of the 64 bits at 8 r of SHAKE-128 of the trajectory's name."""
    key = scored.trajectory.key
    length = len(scored.trajectory.response_ids)
    name = f"{seed}\n{key.epoch}\n{key.sample_index}\n{key.prompt_id}".encode()
    digest = hashlib.shake_128(name).digest(8 * length)
    return [
        int.from_bytes(digest[8 * r : 8 * r + 8], "little") % 2**53 / 2**53 for r in range(length)
    ]
