"""Seconds of a weight sync, phase by phase, on a vLLM engine that goes on writing.

The demo's student (120 M parameters, bfloat16) is sent from this process into one engine with eight
requests in flight. ``gap`` is measured outside, between two tokens of one response: the last under
the old weights and the first under the new ones. It holds one step that reads all responses again,
since cached keys and values of old weights are dropped; ``paused`` is what ``install_weights``
returns: the wait for the step under way, load, repack, label, resume. ``probe gap`` is the mean
absolute difference between the engine's and transformers' log-probabilities of random tokens. Needs
the demo's models: ``eopd models demo``.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from eopd.config import RolloutConfig, StudentConfig
from eopd.learner.lora import whole_tensors
from eopd.rollout.vllm_engine import VllmRolloutEngine
from eopd.runtime.placement import EAGER, vllm_env
from eopd.types import PolicyVersion
from eopd.weights.layout import DIGEST_BYTES, ModelSource, bucket_num_bytes, pack, write_digest
from eopd.weights.transfer import WeightSender
from eopd.weights.vllm_receiver import engine_options
from eopd.weights.wire import Backend

STUDENT = Path("~/.cache/eopd/models/smollm2-26-layers").expanduser()
REQUESTS, PROMPT, RESPONSE, BUCKET_BYTES = 8, 64, 900, 64 << 20
BAR_S = 0.5  # paused, at most


class Stopwatch:
    """Seconds of every call of some methods, and the calls themselves."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def around(
        self, name: str, call: Callable[..., Awaitable[object]]
    ) -> Callable[..., Awaitable[object]]:
        async def timed(*args: object, **kwargs: object) -> object:
            started = time.monotonic()
            result = await call(*args, **kwargs)
            self.seconds.setdefault(name, []).append(time.monotonic() - started)
            return result

        return timed


async def write(engine: VllmRolloutEngine, seed: int, ticks: list[float]) -> None:
    """One response, with the time of every token."""
    ids = np.random.default_rng(seed).integers(100, 20_000, PROMPT).tolist()
    sampling = SamplingParams(
        max_tokens=RESPONSE,
        temperature=1.0,
        seed=seed,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    async for _ in engine._llm.generate(
        TokensPrompt(prompt_token_ids=ids),
        sampling,
        f"r{seed}",
    ):
        ticks.append(time.monotonic())


def longest_gap(ticks: list[float], since: float, until: float) -> float:
    """Between two tokens, of which the first came before ``until`` and the second after
    ``since``.
    """
    return max(
        after - before for before, after in pairwise(ticks) if after > since and before < until
    )


async def all_wrote(ticks: list[list[float]], more: int) -> None:
    """Until every response has so many more tokens."""
    targets = [len(t) + more for t in ticks]
    while any(len(t) < target for t, target in zip(ticks, targets, strict=True)):
        await asyncio.sleep(0.01)


def hash_seconds(model: PreTrainedModel, sender: WeightSender) -> float:
    tensors = dict(model.named_parameters())
    total = 0.0

    for bucket in sender._buckets:
        buffer_B, digest_D = (
            torch.empty(size, dtype=torch.uint8)
            for size in (bucket_num_bytes(bucket), DIGEST_BYTES)
        )
        pack([tensors[parameter.name] for parameter in bucket], buffer_B)
        started = time.monotonic()
        write_digest(buffer_B, digest_D)
        total += time.monotonic() - started

    return total


def probe_gap(model: PreTrainedModel, token_ids: np.ndarray, probed: np.ndarray) -> float:
    ids = torch.from_numpy(token_ids).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)

    return float(np.abs(logprobs.gather(1, ids[1:, None])[:, 0].numpy() - probed).mean())


async def publish(
    engine: VllmRolloutEngine, sender: WeightSender, step: int
) -> tuple[float, float, int]:
    """Transfer seconds, seconds paused, bytes."""
    started = time.monotonic()
    await engine.begin_weights()
    num_bytes = await asyncio.to_thread(sender.send)
    transfer_s = time.monotonic() - started
    return transfer_s, await engine.install_weights(PolicyVersion(0, step)), num_bytes


async def measure(rounds: int, backend: Backend) -> tuple[dict[str, list[float]], int]:
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16)
    engine = await VllmRolloutEngine.start(
        StudentConfig(model=STUDENT, dtype="bfloat16"),
        RolloutConfig(),
        max_sequence_tokens=PROMPT + RESPONSE,
        weight_options=engine_options(),
    )
    source = ModelSource(
        whole_tensors(model),
        rank=0,
        shape=lambda tensor: tensor.shape,
        gathered=lambda tensors: nullcontext(False),
    )
    sender = WeightSender(
        source,
        rank=0,
        backend=backend,
        address="127.0.0.1",
        bucket_bytes=BUCKET_BYTES,
        connect_timeout_s=60.0,
        timeout_s=120.0,
    )
    (info,) = sender.open(1, "secret")
    await asyncio.gather(asyncio.to_thread(sender.accept), engine.connect_weights(info))
    watch = Stopwatch()

    for name, method in (
        ("wait for the pause", "pause_generation"),
        ("load", "update_weights"),
        ("repack, label", "finish_weight_update"),
        ("resume", "resume_generation"),
    ):
        setattr(engine._llm, method, watch.around(name, getattr(engine._llm, method)))

    ticks: list[list[float]] = [[] for _ in range(REQUESTS)]
    writing = [
        asyncio.create_task(
            write(
                engine,
                seed,
                ticks[seed],
            )
        )
        for seed in range(REQUESTS)
    ]
    seconds: dict[str, list[float]] = {
        "transfer": [],
        "hash, each end": [],
        "paused": [],
        "gap": [],
        "step": [],
    }
    num_bytes = 0

    for step in range(1, rounds + 1):
        await all_wrote(ticks, 30)
        since = time.monotonic()
        step_s = median(np.diff(ticks[0][-25:]))
        transfer_s, paused_s, num_bytes = await publish(engine, sender, step)
        until = time.monotonic()
        await all_wrote(ticks, 2)
        row = {
            "transfer": transfer_s,
            "paused": paused_s,
            "hash, each end": hash_seconds(model, sender),
        }
        row |= {"gap": max(longest_gap(t, since, until) for t in ticks), "step": step_s}
        for name, value in row.items():
            seconds[name].append(value)

    for task in writing:
        task.cancel()

    await asyncio.gather(*writing, return_exceptions=True)
    parts = dict(watch.seconds)
    text = np.random.default_rng(1).integers(100, 20_000, 200).astype(np.int32)
    parts["probe gap, nats"] = [probe_gap(model, text, await engine.probe(text))]
    await engine.close()

    return seconds | parts, num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", choices=["shared", "gloo"], default="shared")
    options = parser.parse_args()
    if not STUDENT.is_dir():
        sys.exit(f"{STUDENT} is missing; make it with: eopd models demo")

    os.environ.update(vllm_env(options.threads) | EAGER)
    torch.set_num_threads(1)
    seconds, num_bytes = asyncio.run(measure(options.rounds, options.backend))
    say = sys.stdout.write
    say(
        f"{num_bytes / 1e6:.0f} MB over {options.backend}, in buckets of {BUCKET_BYTES >> 20} MiB, {REQUESTS} "
        "requests in flight\n"
    )
    say("| seconds | median | worst |\n|---|---|---|\n")
    for name, values in seconds.items():
        say(f"| {name} | {median(values):.4f} | {max(values):.4f} |\n")

    worst = max(seconds["paused"])
    say(f"paused {worst:.2f} (at most {BAR_S:g}: {'pass' if worst <= BAR_S else 'MISS'})\n")


if __name__ == "__main__":
    main()
