"""Scored tokens/s of the teacher's two heads, beside vLLM's own ``prompt_logprobs=16`` and a bare
pooling pass.

One run, one model, the same tokens: 64 sequences of 128 tokens, of which the last 64, or all but
the first, are response. Tokens are those the model reads. The four engines live side by side and
take turns in every round, so that a busy neighbour meets all; a time is the best of all rounds.
``bare pooling`` is the stock model with one vector per sequence and no projection to the
vocabulary: what reading alone costs. ``prompt_logprobs`` projects every row whatever is asked, and
returns no entropy. All engines run eagerly, with the same step of at most 2,048 tokens. Needs the
demo's
teacher: ``eopd models demo``.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
from vllm import AsyncEngineArgs, PoolingParams, SamplingParams, TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

from eopd.config import TeacherConfig
from eopd.runtime.placement import vllm_env
from eopd.teacher.vllm_scorer import VllmTeacherScorer
from eopd.types import Header, PromptSample, StopReason, Stored, Trajectory

TEACHER = Path("~/.cache/eopd/models/smollm2-135m").expanduser()
V, K, LENGTH = 49_152, 16, 128
HALF, WHOLE = LENGTH // 2, LENGTH - 1  # response tokens of a sequence
# at least, of prompt_logprobs; at most, of bare pooling's time
BARS = {"model": (1.0, 1.3), "float32": (0.8, 1.7)}
ENGINE = {
    "kv_cache_memory_bytes": 512 << 20,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "enforce_eager": True,
}

Sequences = Sequence[list[int]]


def trajectory(ids: list[int], num_response: int) -> Stored[Trajectory]:
    split = len(ids) - num_response
    prompt = PromptSample(
        epoch=0,
        prompt_id="0",
        source="bench",
        token_ids=np.array(ids[:split], np.int32),
        reference_answer=None,
    )
    body = Trajectory(
        prompt=prompt,
        sample_index=0,
        response_ids=np.array(ids[split:], np.int32),
        loss_mask=np.ones(num_response, np.bool_),
        rollout_logprobs=np.zeros(num_response, np.float32),
        policy_versions=np.zeros(num_response, np.int32),
        stop_reason=StopReason.LENGTH,
    )

    return Stored(Header.of(body, {}), body)


async def start_ours(head_dtype: str) -> VllmTeacherScorer:
    config = TeacherConfig(model=TEACHER, head_dtype=head_dtype, vllm=ENGINE)
    return await VllmTeacherScorer.start(config, top_k=K, max_sequence_tokens=LENGTH + 1)


async def score(scorer: VllmTeacherScorer, sequences: Sequences, num_response: int) -> None:
    for result in await asyncio.gather(
        *(scorer.score(trajectory(ids, num_response)) for ids in sequences)
    ):
        if not isinstance(result, Stored):
            raise RuntimeError(result.detail)


def start_stock(**kind: object) -> AsyncLLM:
    common = {"dtype": "bfloat16", "max_model_len": LENGTH + 1, "enable_prefix_caching": False}
    args = AsyncEngineArgs(
        model=str(TEACHER),
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **common,
        **kind,
        **ENGINE,
    )
    return AsyncLLM.from_engine_args(args)


async def pool(llm: AsyncLLM, sequences: Sequences) -> None:
    async def one(ids: list[int]) -> None:
        request = TokensPrompt(prompt_token_ids=ids)
        async for _ in llm.encode(request, PoolingParams(task="embed"), uuid4().hex):
            pass

    await asyncio.gather(*(one(ids) for ids in sequences))


async def read_prompts(llm: AsyncLLM, sequences: Sequences) -> None:
    sampling = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=K,
        detokenize=False,
    )

    async def one(ids: list[int]) -> None:
        request = TokensPrompt(prompt_token_ids=ids)
        outputs = [
            output
            async for output in llm.generate(
                request,
                sampling,
                uuid4().hex,
            )
        ]
        if len(outputs[-1].prompt_logprobs) != len(ids):
            raise RuntimeError(
                f"{len(outputs[-1].prompt_logprobs)} prompt log-probabilities came for "
                f"{len(ids)} tokens"
            )

    await asyncio.gather(*(one(ids) for ids in sequences))


async def measure(count: int, rounds: int) -> dict[str, float]:
    """Best seconds of every variant; a first round, on a few sequences, warms up."""
    bare = start_stock(runner="pooling", convert="embed")
    stock = start_stock(max_logprobs=K)
    ours = {head_dtype: await start_ours(head_dtype) for head_dtype in BARS}
    variants: dict[str, Callable[[Sequences], Awaitable[None]]] = {
        "bare pooling": lambda some: pool(bare, some),
        "prompt_logprobs": lambda some: read_prompts(stock, some),
    }
    for name, scorer in ours.items():
        variants[name] = lambda some, scorer=scorer: score(scorer, some, HALF)
        variants[f"{name}, all rows"] = lambda some, scorer=scorer: score(
            scorer,
            some,
            WHOLE,
        )

    sequences = np.random.default_rng(0).integers(0, V, (count, LENGTH)).tolist()
    best = dict.fromkeys(variants, float("inf"))

    for some in [sequences[:4], *[sequences] * rounds]:
        for name, run in variants.items():
            started = time.perf_counter()
            await run(some)
            seconds = time.perf_counter() - started
            best[name] = min(best[name], seconds) if some is sequences else best[name]

    for llm in (bare, stock):
        llm.shutdown()

    for scorer in ours.values():
        await scorer.close()

    return best


def verdict(value: float, bar: float, *, at_most: bool) -> str:
    met = value <= bar if at_most else value >= bar
    return f"{value:.2f} (at {'most' if at_most else 'least'} {bar:g}: {'pass' if met else 'MISS'})"


def show(best: dict[str, float], num_tokens: int) -> None:
    say = sys.stdout.write
    say(
        "| variant | time, s | tokens/s | speed of prompt_logprobs | time of bare pooling "
        "|\n" + "|---" * 5 + "|\n"
    )

    for name, seconds in best.items():
        speed = best["prompt_logprobs"] / seconds
        times = seconds / best["bare pooling"]
        cells = [f"{speed:.2f}", f"{times:.2f}"]
        if name in BARS:
            at_least, at_most = BARS[name]
            cells = [
                verdict(
                    speed,
                    at_least,
                    at_most=False,
                ),
                verdict(times, at_most, at_most=True),
            ]

        say(f"| {name} | {seconds:.2f} | {num_tokens / seconds:,.0f} | {cells[0]} | {cells[1]} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a glance, on 16 sequences; not the bars",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not TEACHER.is_dir():
        sys.exit(f"{TEACHER} is missing; make it with: eopd models demo")

    os.environ.update(vllm_env(options.threads))
    count = 16 if options.quick else 64
    sys.stdout.write(
        f"{count} sequences of {LENGTH} tokens, V = {V:,}, K = {K}, bfloat16, "
        f"{options.threads} threads\n"
    )
    show(asyncio.run(measure(count, options.rounds)), count * LENGTH)


if __name__ == "__main__":
    main()
