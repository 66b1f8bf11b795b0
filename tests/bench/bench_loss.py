"""Extra memory and time of the chunked objective beside a dense one, at the vocabularies of SmolLM2 and Qwen.

Every measurement is a process of its own, and those of a ratio alternate, chunked, dense, chunked, dense, so that a
busy neighbour meets both. Extra memory is the peak resident size of forward and backward, less what was resident
before (inputs, and the code that a run on eight rows has loaded) and less the returned gradients; scratch of the
matrix library counts. A time is the best of all runs. The dense loss is the leanest that autograd gives: one
log-softmax of [T, V] float32 logits, gathers, no diagnostics; ``dense_f32`` also makes its logits from float32
operands, as the chunked loss does.
"""

import argparse
import ctypes
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.loss.objective import LossTokens, objective

D, K = 576, 16
FLATNESS, MEMORY_RATIO, TIME_RATIO = 0.10, 10.0, 1.25  # the bars
GROWTH = dict.fromkeys((49_152, 151_936), (4096, 8192, 16_384, 32_768))  # T over which extra memory must be flat
BESIDE = {49_152: 8192, 151_936: 2048}  # T at which the dense loss is measured too
QUICK_GROWTH, QUICK_BESIDE = {49_152: (1024, 4096)}, {49_152: 2048}


@dataclass(frozen=True)
class Measurement:
    extra_bytes: int
    seconds: float
    cpu_seconds: float
    value: float

    def best(self, other: "Measurement") -> "Measurement":
        seconds, cpu_seconds = min(self.seconds, other.seconds), min(self.cpu_seconds, other.cpu_seconds)
        return Measurement(max(self.extra_bytes, other.extra_bytes), seconds, cpu_seconds, self.value)


@dataclass(frozen=True)
class Case:
    kind: str
    v: int
    t: int
    dtype: str


def make_tokens(t: int, v: int) -> LossTokens:
    outcomes = (3.0 * torch.randn(t, K + 1)).log_softmax(-1)
    return LossTokens(
        target_ids_T=torch.randint(v, (t,)),
        loss_mask_T=torch.ones(t, dtype=torch.bool),
        rollout_logprobs_T=-5.0 + torch.randn(t),
        gate_T=(torch.rand(t) < 0.2).float(),
        teacher_logprobs_T=-5.0 + torch.randn(t),
        teacher_topk_ids_TK=(torch.randint(v, (t, 1)) + 97 * torch.arange(K)) % v,
        teacher_topk_logprobs_TK=outcomes[:, :K],
        teacher_tail_logprobs_T=outcomes[:, K],
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


def loss_of(kind: str, hidden: Tensor, weight: Tensor, tokens: LossTokens) -> Tensor:
    config = LossConfig()
    if kind == "chunked":
        return objective(hidden, weight, tokens, config, num_loss_tokens=len(hidden), alpha=config.alpha)[0]
    if kind == "dense_f32":
        return dense(hidden.float(), weight.float(), tokens, config)
    return dense(hidden, weight, tokens, config)


def make_inputs(case: Case) -> tuple[Tensor, Tensor, LossTokens]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.t, D, dtype=dtype).requires_grad_()
    weight = (0.05 * torch.randn(case.v, D, dtype=dtype)).requires_grad_()
    return hidden, weight, make_tokens(case.t, case.v)


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def measure(case: Case, runs: int) -> Measurement:
    few = make_inputs(Case(case.kind, 64, 8, case.dtype))
    loss_of(case.kind, *few).backward()  # loads code, which is no memory of the loss
    hidden, weight, tokens = make_inputs(case)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that a run could reuse unseen
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
    before = status_bytes("VmRSS")
    seconds, cpu_seconds = [], []
    for _ in range(runs):
        hidden.grad = weight.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(case.kind, hidden, weight, tokens)
        loss.backward()
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    returned = sum(x.numel() * x.element_size() for x in (hidden, weight))
    return Measurement(status_bytes("VmHWM") - before - returned, min(seconds), min(cpu_seconds), loss.item())


def measure_apart(case: Case, runs: int, threads: int) -> Measurement:
    """In a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", json.dumps([asdict(case), runs])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measurement(**json.loads(done.stdout))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def show(case: Case, found: Measurement) -> None:
    rate, megabytes = case.t / found.seconds, found.extra_bytes / 1e6
    cells = f"{megabytes:,.0f} | {found.seconds:.2f} | {found.cpu_seconds:.2f} | {rate:,.0f} | {found.value:.5f}"
    say(f"| {case.dtype} | {case.kind} | {case.v:,} | {case.t:,} | {cells} |")


def verdict(what: str, value: float, bar: float, *, at_most: bool) -> str:
    met = value <= bar if at_most else value >= bar
    return f"{what} {value:.3g} (at {'most' if at_most else 'least'} {bar:g}): {'pass' if met else 'MISS'}"


def measure_growth(dtype: str, v: int, sizes: tuple[int, ...], threads: int) -> str:
    """Rows of the table over T; the line about flatness."""
    extra = []
    for t in sizes:
        case = Case("chunked", v, t, dtype)
        found = measure_apart(case, 1, threads)
        show(case, found)
        extra.append(found.extra_bytes)
    line = verdict("extra memory grows by", max(extra) / min(extra) - 1.0, FLATNESS, at_most=True)
    return f"{dtype}, V = {v:,}, T = {sizes[0]:,} to {sizes[-1]:,}: {line}"


def measure_ratios(dtype: str, v: int, t: int, rounds: int, threads: int) -> list[str]:
    """Rows of the table for chunked and dense; the lines about memory and time."""
    kinds = ["chunked", "dense"] if dtype == "float32" else ["chunked", "dense", "dense_f32"]
    cases = {kind: Case(kind, v, t, dtype) for kind in kinds}
    best: dict[str, Measurement] = {}
    for kind in itertools.chain.from_iterable([kinds] * rounds):
        found = measure_apart(cases[kind], 2, threads)
        best[kind] = best.get(kind, found).best(found)
    for kind in kinds:
        show(cases[kind], best[kind])
        tolerance = 1e-5 if dtype == "float32" else 1e-3
        if not math.isclose(best[kind].value, best["chunked"].value, rel_tol=tolerance):
            raise RuntimeError(f"chunked and {kind} are different losses: {best}")
    ours, lines = best["chunked"], []
    for kind in kinds[1:]:
        other, where = best[kind], f"{dtype}, V = {v:,}, T = {t:,}, {kind}"
        memory = verdict("memory ratio", other.extra_bytes / ours.extra_bytes, MEMORY_RATIO, at_most=False)
        seconds = verdict("time ratio", ours.seconds / other.seconds, TIME_RATIO, at_most=True)
        lines += [f"{where}: {memory}", f"{where}: {seconds}; of CPU time {ours.cpu_seconds / other.cpu_seconds:.3g}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a glance, on small sizes; not the bars")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--bars", nargs="+", default=["growth", "ratios"], choices=["growth", "ratios"])
    parser.add_argument("--rounds", type=int, default=2, help="of alternating processes to a ratio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        case, runs = json.loads(options.one)
        sys.stdout.write(json.dumps(asdict(measure(Case(**case), runs))))
        return
    say(f"D = {D}, K = {K}, {options.threads} threads")
    say("| dtype | loss | V | T | extra MB | time, s | CPU, s | tokens/s | value |\n" + "|---" * 9 + "|")
    lines = []
    if "growth" in options.bars:
        growth = QUICK_GROWTH if options.quick else GROWTH
        lines += [measure_growth(options.dtype, v, sizes, options.threads) for v, sizes in growth.items()]
    if "ratios" in options.bars:
        for v, t in (QUICK_BESIDE if options.quick else BESIDE).items():
            lines += measure_ratios(options.dtype, v, t, options.rounds, options.threads)
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
