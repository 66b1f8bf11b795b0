"""Learner tokens/s beside a bare transformers + AdamW loop with a dense cross-entropy on the same
loss tokens.

Both run in one process, a step of the one after a step of the other, on the same packed tokens,
under the same attention and dtype, with clipping; the bare loop has no teacher, no importance
weights, no metrics, and in bfloat16 no float32 master weights. Tokens are packed input tokens; a
time is the median of all steps after the first. The target: at least 0.9x. Needs the demo's
student: ``eopd models demo``.

Where torch sees a GPU both run there, on a model of the shape of Qwen3-0.6B with random weights and
longer responses; ``--offload`` keeps the optimiser in host memory. The memory is the peak of
torch's allocator over both.
"""

import argparse
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eopd.config import LearnerConfig, LossConfig, StudentConfig
from eopd.config.choices import choose_zero_stage
from eopd.learner.deepspeed_backend import DeepspeedBackend
from eopd.learner.learner import LearnerRank
from eopd.packing import pack_batch
from eopd.types import (
    Exact,
    Header,
    PackedBatch,
    PromptSample,
    ScoredTrajectory,
    StopReason,
    Stored,
    TeacherSignal,
    Trajectory,
)

STUDENT = Path("~/.cache/eopd/models/smollm2-26-layers").expanduser()
SHAPES = [(8, 32, 32), (4, 128, 384)]  # trajectories, prompt, response
GPU_SHAPES = [(8, 64, 448), (4, 64, 1984)]
K, BAR = 16, 0.9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OFFLOADED = ("offload_optimizer",)


def make_scored(
    rng: np.random.Generator, index: int, num_prompt: int, num_response: int, v: int
) -> Stored[ScoredTrajectory]:
    outcomes = (
        torch.from_numpy(3.0 * rng.normal(size=(num_response, K + 1)))
        .log_softmax(-1)
        .float()
        .numpy()
    )
    trajectory = Trajectory(
        prompt=PromptSample(
            epoch=0,
            prompt_id=str(index),
            source="bench",
            token_ids=rng.integers(0, v, num_prompt).astype(np.int32),
            reference_answer=None,
        ),
        sample_index=0,
        response_ids=rng.integers(0, v, num_response).astype(np.int32),
        loss_mask=np.ones(num_response, np.bool_),
        rollout_logprobs=rng.normal(size=num_response).astype(np.float32) - 5.0,
        policy_versions=np.zeros(num_response, np.int32),
        stop_reason=StopReason.LENGTH,
    )
    signal = TeacherSignal(
        teacher="teacher",
        token_logprobs=rng.normal(size=num_response).astype(np.float32) - 5.0,
        entropy=Exact(rng.uniform(0.0, 3.0, num_response).astype(np.float32)),
        topk_ids=(
            (
                rng.integers(
                    0,
                    v,
                    (num_response, 1),
                )
                + 97 * np.arange(K)
            )
            % v
        ).astype(np.int32),
        topk_logprobs=outcomes[:, :K],
        tail_logprobs=outcomes[:, K],
    )

    return Stored(Header.of(trajectory, {}), ScoredTrajectory(trajectory=trajectory, signal=signal))


def make_qwen3(directory: Path) -> Path:
    """A model of the shape of Qwen3-0.6B, its weights random."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def bare_step(
    student: Path, dtype: str, batch: Sequence[Stored[ScoredTrajectory]]
) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(
        student,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
    )
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    trajectories = [stored.body.trajectory for stored in batch]
    pairs = [(body.prompt.token_ids, body.response_ids) for body in trajectories]
    inputs = torch.from_numpy(
        np.concatenate([np.concatenate([p, r[:-1]]) for p, r in pairs]).astype(np.int64)
    )
    positions = torch.cat([torch.arange(len(p) + len(r) - 1) for p, r in pairs])
    rows = torch.cat([torch.arange(len(p) + len(r) - 1) >= len(p) - 1 for p, r in pairs])
    targets = torch.from_numpy(np.concatenate([r for _, r in pairs]).astype(np.int64))

    inputs, positions, rows, targets = (x.to(DEVICE) for x in (inputs, positions, rows, targets))

    def step() -> None:
        logits = model(
            input_ids=inputs[None],
            position_ids=positions[None],
            use_cache=False,
        ).logits[0]
        functional.cross_entropy(logits[rows].float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    student: Path,
    dtype: str,
    stage: int,
    threads: int,
    batch: PackedBatch,
    *,
    offload: bool = False,
) -> Callable[[], object]:
    zero = {name: {"device": "cpu"} for name in OFFLOADED if offload}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    learner = LearnerRank(
        DeepspeedBackend,
        StudentConfig(model=student, dtype=dtype),
        LearnerConfig(
            threads=threads, zero_stage=stage, lr=1e-6, deepspeed={"zero_optimization": zero}
        ),
        LossConfig(top_k=K),
        temperature=1.0,
        total_batches=100,
        seed=0,
        entropy_bounds={"teacher": "mid"},
        broken=Path(tempfile.gettempdir()) / "eopd-bench-broken",
        rank=0,
        world_size=1,
        master_address="127.0.0.1",
        master_port=port,
    )
    share = batch.share(0)

    return lambda: learner.step(share)


def measure(steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, alternating."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, mine in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

            mine.append(time.perf_counter() - start)

    return [statistics.median(mine[1:]) for mine in seconds]


def compare(
    student: Path, v: int, shape: tuple[int, int, int], options: argparse.Namespace, dtype: str
) -> str:
    """A row of the table."""
    count, num_prompt, num_response = shape
    offloaded = OFFLOADED if options.offload else ()
    chosen, _ = choose_zero_stage(ranks=1, dtype=dtype, offloaded=offloaded)
    stage = chosen if options.zero_stage is None else options.zero_stage
    rng = np.random.default_rng(0)
    batch = [
        make_scored(
            rng,
            index,
            num_prompt,
            num_response,
            v,
        )
        for index in range(count)
    ]
    packed = pack_batch(batch, steps=1, ranks=1, token_budget=8192, alpha=1.0)
    ours = our_step(
        student,
        dtype,
        stage,
        options.threads,
        packed,
        offload=options.offload,
    )
    found, bare = measure([ours, bare_step(student, dtype, batch)], options.rounds)
    num_tokens = count * (num_prompt + num_response - 1)
    ratio = bare / found
    cells = f"{dtype} | {stage} | {count} x ({num_prompt} + {num_response})"
    rates = f"{num_tokens / found:,.0f} | {num_tokens / bare:,.0f}"

    return (
        f"| {cells} | {rates} | {ratio:.2f} (at least {BAR}: "
        f"{'pass' if ratio >= BAR else 'MISS'}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16", "float32"],
        choices=["bfloat16", "float32"],
    )
    parser.add_argument(
        "--zero-stage",
        type=int,
        choices=[0, 1, 2, 3],
        help="else what auto chooses",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the optimiser in host memory",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as scratch:
        if DEVICE == "cuda":
            student = make_qwen3(Path(scratch))
            v = 151_936
            shapes = GPU_SHAPES
        elif STUDENT.is_dir():
            student, v, shapes = STUDENT, 49_152, SHAPES
        else:
            sys.exit(f"{STUDENT} is missing; make it with: eopd models demo")

        say(torch.cuda.get_device_name() if DEVICE == "cuda" else f"{options.threads} threads")
        say(
            "| dtype | ZeRO | trajectories | ours, tokens/s | bare, tokens/s | ratio |\n"
            + "|---" * 6
            + "|"
        )
        for dtype in options.dtype:
            for shape in shapes:
                say(compare(student, v, shape, options, dtype))

    if DEVICE == "cuda":
        say(f"peak of both together: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
