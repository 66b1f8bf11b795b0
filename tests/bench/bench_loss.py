"""Extra memory and time of the chunked objective beside a dense one, at the vocabularies of SmolLM2
and Qwen.

Every measurement is a process of its own, and those of a ratio alternate, chunked, dense, chunked,
dense, so that a busy neighbour meets both. Extra memory is the peak resident size of forward and
backward, less what was resident before (inputs, and the code that a run on eight rows has loaded)
and less the returned gradients; scratch of the matrix library counts. A time is the best of all
runs. The dense loss is the leanest that autograd gives: one log-softmax of [T, V] float32 logits,
gathers, no diagnostics; ``dense_f32`` also makes its logits from float32 operands, as the chunked
loss does on CPUs.

With ``--device cuda`` the memory is that of torch's allocator, so that one process is enough, and
all seconds are wall seconds of a synchronised device.
"""

import argparse
import ctypes
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.loss.chunked import Head, LossTokens
from eopd.loss.objective import objective

K = 16
FLATNESS, MEMORY_RATIO, TIME_RATIO = 0.10, 10.0, 1.25  # the bars
# T over which extra memory must be flat
GROWTH = dict.fromkeys((49_152, 151_936), (4096, 8192, 16_384, 32_768))
BESIDE = {49_152: 8192, 151_936: 2048}  # T at which the dense loss is measured too
QUICK_GROWTH, QUICK_BESIDE = {49_152: (1024, 4096)}, {49_152: 2048}
CUDA_BESIDE = {49_152: 8192, 151_936: 8192}
CUDA_RUNS = 10


@dataclass(frozen=True)
class Measurement:
    extra_bytes: int
    seconds: float
    cpu_seconds: float
    value: float

    def best(self, other: "Measurement") -> "Measurement":
        seconds = min(self.seconds, other.seconds)
        cpu_seconds = min(self.cpu_seconds, other.cpu_seconds)
        return Measurement(
            max(self.extra_bytes, other.extra_bytes),
            seconds,
            cpu_seconds,
            self.value,
        )


@dataclass(frozen=True)
class Case:
    kind: str
    v: int
    t: int
    dtype: str
    d: int
    device: str
    chunk_tokens: int


def make_tokens(t: int, v: int, device: str) -> LossTokens:
    randn = functools.partial(torch.randn, device=device)
    outcomes = (3.0 * randn(t, K + 1)).log_softmax(-1)
    return LossTokens(
        target_ids_T=torch.randint(v, (t,), device=device),
        loss_mask_T=torch.ones(t, dtype=torch.bool, device=device),
        rollout_logprobs_T=-5.0 + randn(t),
        gate_T=(torch.rand(t, device=device) < 0.2).float(),
        teacher_logprobs_T=-5.0 + randn(t),
        teacher_topk_ids_TK=(
            torch.randint(v, (t, 1), device=device) + 97 * torch.arange(K, device=device)
        )
        % v,
        teacher_topk_logprobs_TK=outcomes[:, :K],
        teacher_tail_logprobs_T=outcomes[:, K],
        teacher_entropy_T=3.0 * torch.rand(t, device=device),
    )


def dense(hidden: Tensor, weight: Tensor, tokens: LossTokens, config: LossConfig) -> Tensor:
    """The paper's forms, over [T, V]; on-policy, so that the clip is idle."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    log_p_y = log_p.gather(1, tokens.target_ids_T[:, None]).squeeze(1)
    old = log_p_y.detach()
    importance = (old - tokens.rollout_logprobs_T).exp().clamp(max=2.0)
    reverse = -importance * (tokens.teacher_logprobs_T - old) * (log_p_y - old).exp()
    log_q = tokens.teacher_topk_logprobs_TK.log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p.gather(1, tokens.teacher_topk_ids_TK))).sum(-1)

    return (reverse + config.alpha * tokens.gate_T * forward).sum() / len(log_p)


def loss_of(case: Case, hidden: Tensor, weight: Tensor, tokens: LossTokens) -> Tensor:
    config = LossConfig()
    if case.kind == "chunked":
        sizes = {"num_loss_tokens": len(hidden), "chunk_tokens": case.chunk_tokens}
        head = Head(weight_VD=weight)
        return objective(hidden, head, tokens, config, alpha=config.alpha, **sizes)[0]

    if case.kind == "dense_f32":
        return dense(hidden.float(), weight.float(), tokens, config)

    return dense(hidden, weight, tokens, config)


def make_inputs(case: Case) -> tuple[Tensor, Tensor, LossTokens]:
    torch.manual_seed(0)
    randn = functools.partial(
        torch.randn,
        dtype=getattr(torch, case.dtype),
        device=case.device,
    )
    hidden = randn(case.t, case.d).requires_grad_()
    weight = (0.05 * randn(case.v, case.d)).requires_grad_()
    return hidden, weight, make_tokens(case.t, case.v, case.device)


def status_bytes(key: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key + ":")
    )
    return int(line.split()[1]) * 1024


def forget_peak(device: str) -> int:
    """Start a new peak; bytes in use now."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that a run could reuse unseen
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, runs: int) -> Measurement:
    few = make_inputs(replace(case, v=64, t=8))
    loss_of(case, *few).backward()  # loads code, which is no memory of the loss
    hidden, weight, tokens = make_inputs(case)
    before = forget_peak(case.device)
    seconds, cpu_seconds = [], []

    for _ in range(runs):
        hidden.grad = weight.grad = None
        synchronize(case.device)
        wall = time.perf_counter()
        cpu = time.process_time()
        loss = loss_of(case, hidden, weight, tokens)
        loss.backward()
        synchronize(case.device)
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)

    returned = sum(x.numel() * x.element_size() for x in (hidden, weight))

    return Measurement(
        peak_bytes(case.device) - before - returned,
        min(seconds),
        min(cpu_seconds),
        loss.item(),
    )


def measure_apart(case: Case, runs: int, threads: int) -> Measurement:
    """In a process of its own, where memory is that of the process."""
    if case.device == "cuda":
        return measure(case, max(runs, CUDA_RUNS))

    command = [
        sys.executable,
        __file__,
        "--threads",
        str(threads),
        "--one",
        json.dumps([asdict(case), runs]),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)

    return Measurement(**json.loads(done.stdout))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def show(case: Case, found: Measurement) -> None:
    rate = case.t / found.seconds
    megabytes = found.extra_bytes / 1e6
    cells = (
        f"{megabytes:,.0f} | {found.seconds:.4g} | {found.cpu_seconds:.4g} | {rate:,.0f} | "
        f"{found.value:.5f}"
    )
    say(f"| {case.dtype} | {case.kind} | {case.v:,} | {case.t:,} | {cells} |")


def verdict(what: str, value: float, bar: float, *, at_most: bool) -> str:
    met = value <= bar if at_most else value >= bar
    return (
        f"{what} {value:.3g} (at {'most' if at_most else 'least'} {bar:g}): "
        f"{'pass' if met else 'MISS'}"
    )


def measure_growth(like: Case, v: int, sizes: tuple[int, ...], threads: int) -> str:
    """Rows of the table over T; the line about flatness."""
    extra = []
    for t in sizes:
        case = replace(like, v=v, t=t)
        found = measure_apart(case, 1, threads)
        show(case, found)
        extra.append(found.extra_bytes)

    line = verdict(
        "extra memory grows by",
        max(extra) / min(extra) - 1.0,
        FLATNESS,
        at_most=True,
    )

    return f"{like.dtype}, V = {v:,}, T = {sizes[0]:,} to {sizes[-1]:,}: {line}"


def measure_ratios(like: Case, v: int, t: int, rounds: int, threads: int) -> list[str]:
    """Rows of the table for chunked and dense; the lines about memory and time."""
    kinds = ["chunked", "dense"] if like.dtype == "float32" else ["chunked", "dense", "dense_f32"]
    cases = {kind: replace(like, kind=kind, v=v, t=t) for kind in kinds}
    best: dict[str, Measurement] = {}
    for kind in itertools.chain.from_iterable([kinds] * rounds):
        found = measure_apart(cases[kind], 2, threads)
        best[kind] = best.get(kind, found).best(found)

    for kind in kinds:
        show(cases[kind], best[kind])
        tolerance = 1e-5 if like.dtype == "float32" else 1e-3
        if not math.isclose(best[kind].value, best["chunked"].value, rel_tol=tolerance):
            raise RuntimeError(f"chunked and {kind} are different losses: {best}")

    ours, lines = best["chunked"], []

    for kind in kinds[1:]:
        other = best[kind]
        where = f"{like.dtype}, V = {v:,}, T = {t:,}, {kind}"
        memory = verdict(
            "memory ratio",
            other.extra_bytes / ours.extra_bytes,
            MEMORY_RATIO,
            at_most=False,
        )
        seconds = verdict(
            "time ratio",
            ours.seconds / other.seconds,
            TIME_RATIO,
            at_most=True,
        )
        lines += [
            f"{where}: {memory}",
            f"{where}: {seconds}; of CPU time {ours.cpu_seconds / other.cpu_seconds:.3g}",
        ]

    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a glance, on small sizes; not the bars",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
    )
    parser.add_argument(
        "--bars",
        nargs="+",
        default=["growth", "ratios"],
        choices=["growth", "ratios"],
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--hidden",
        type=int,
        default=576,
        help="hidden size; that of SmolLM2-135M by default",
    )
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="of alternating processes to a ratio",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        case, runs = json.loads(options.one)
        sys.stdout.write(json.dumps(asdict(measure(Case(**case), runs))))
        return

    like = Case(
        "chunked",
        0,
        0,
        options.dtype,
        options.hidden,
        options.device,
        options.chunk_tokens,
    )
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    )
    say(f"D = {options.hidden}, K = {K}, chunks of {options.chunk_tokens} tokens, {where}")
    say(
        "| dtype | loss | V | T | extra MB | time, s | CPU, s | tokens/s | value |\n"
        + "|---" * 9
        + "|"
    )
    lines = []
    if "growth" in options.bars:
        growth = QUICK_GROWTH if options.quick else GROWTH
        lines += [
            measure_growth(
                like,
                v,
                sizes,
                options.threads,
            )
            for v, sizes in growth.items()
        ]

    if "ratios" in options.bars:
        beside = CUDA_BESIDE if options.device == "cuda" else BESIDE
        for v, t in (QUICK_BESIDE if options.quick else beside).items():
            lines += measure_ratios(like, v, t, options.rounds, options.threads)

    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
