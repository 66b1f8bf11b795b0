"""What a teacher should say, in float64 over the full vocabulary from transformers, and how
far a signal is from it.
"""

import os

import fakes
import numpy as np
import pytest
import torch

from eopd.types import Exact, Stored, TeacherSignal, Trajectory

MAX_TOKENS = 160
# prompt, response
LENGTHS = [(1, 1), (3, 40), (70, 2), (1, 90), (40, 120), (17, 23), (64, 64), (2, 130)]

# vLLM asks the processor itself, and oneDNN then has no kernel to give it: the process aborts (vLLM
# 0.32.0).
bfloat16_engines = pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ and torch.cpu._is_amx_tile_supported(),
    reason="an imitated processor: vLLM's bfloat16 kernels do not heed ONEDNN_MAX_CPU_ISA",
)


def trajectory(prompt_ids: list[int], response_ids: list[int]) -> Stored[Trajectory]:
    prompt = fakes.prompt(str(len(prompt_ids)), prompt_ids)
    return fakes.stored(fakes.trajectory(response_ids, of=prompt), {"generate_s": 1.5})


def mixed_batch(vocab_size: int) -> list[Stored[Trajectory]]:
    rng = np.random.default_rng(7)
    draw = [
        (rng.integers(vocab_size, size=p).tolist(), rng.integers(vocab_size, size=r).tolist())
        for p, r in LENGTHS
    ]
    return [trajectory(prompt, response) for prompt, response in draw]


def oracle(model: torch.nn.Module, body: Trajectory, temperature: float) -> np.ndarray:
    """Log-probabilities float64 [R, V] of every token at every response position."""
    ids = torch.tensor([[*body.prompt.token_ids.tolist(), *body.response_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(body.prompt.token_ids) - 1 : -1].double()

    return torch.log_softmax(logits / temperature, -1).numpy()


def deviations(
    signal: TeacherSignal, response_ids: np.ndarray, logprobs: np.ndarray
) -> dict[str, float]:
    """Largest absolute error of every part of a signal, in nats; candidates are compared with the
    oracle's by value, and by the oracle's value at their ids, so that a tie may fall either way."""
    assert isinstance(signal.entropy, Exact)
    k = signal.topk_ids.shape[1]
    ordered = -np.sort(-logprobs, axis=1)
    outside = (
        np.logaddexp.reduce(ordered[:, k:], axis=1)
        if k < logprobs.shape[1]
        else np.full(len(ordered), -np.inf)
    )

    with np.errstate(invalid="ignore"):  # -inf minus -inf
        tail = np.where(
            outside == signal.tail_logprobs,
            0.0,
            np.abs(outside - signal.tail_logprobs),
        )

    return {
        "entropy": float(
            np.abs(signal.entropy.entropy + (np.exp(logprobs) * logprobs).sum(1)).max()
        ),
        "token": float(
            np.abs(signal.token_logprobs - logprobs[range(len(logprobs)), response_ids]).max()
        ),
        "topk": float(np.abs(signal.topk_logprobs - ordered[:, :k]).max()),
        "ids": float(
            np.abs(
                np.take_along_axis(
                    logprobs,
                    signal.topk_ids,
                    1,
                )
                - ordered[:, :k]
            ).max()
        ),
        "tail": float(tail.max()),
    }
