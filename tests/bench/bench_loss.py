"""Memory and time of the chunked objective beside a dense one: ``python tests/bench/bench_loss.py [--full]``.

Every measurement is a process of its own. Extra memory is the peak resident size of forward and backward, less what
was resident before and less the returned gradients. The dense loss is the leanest that autograd gives: one
log-softmax of [T, V] float32 logits, gathers, no diagnostics. Time is the better of two runs. The targets: extra
memory flat in T within 10 %, at least 10x under the dense loss, at most 1.25x its time.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eopd.config import LossConfig
from eopd.loss.objective import LossTokens, objective

D, K = 576, 16
SMALL = [("dense", 8192, 512), ("chunked", 8192, 512), ("chunked", 8192, 2048)]
FULL = [
    *[("chunked", 49_152, t) for t in (4096, 8192, 16_384, 32_768)],
    ("dense", 49_152, 8192),
    *[("chunked", 151_936, t) for t in (2048, 4096, 8192)],
    ("dense", 151_936, 2048),
]


@dataclass(frozen=True)
class Measurement:
    extra_bytes: int
    seconds: float


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


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def measure(kind: str, v: int, t: int, dtype: torch.dtype) -> tuple[Measurement, float]:
    torch.manual_seed(0)
    hidden = torch.randn(t, D, dtype=dtype).requires_grad_()
    weight = (0.05 * torch.randn(v, D, dtype=dtype)).requires_grad_()
    tokens, config = make_tokens(t, v), LossConfig()
    hidden.detach()[:8] @ weight.detach()[:8].t()  # loads the kernels before memory is looked at

    def run() -> float:
        hidden.grad = weight.grad = None
        if kind == "dense":
            loss = dense(hidden, weight, tokens, config)
        else:
            loss, _ = objective(hidden, weight, tokens, config, num_loss_tokens=t, alpha=1.0)
        torch.autograd.backward(loss)
        return loss.item()

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
    before = status_bytes("VmRSS")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - start)
    returned = sum(x.numel() * x.element_size() for x in (hidden, weight))
    return Measurement(status_bytes("VmHWM") - before - returned, min(seconds)), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of real vocabularies: some minutes, 12 GB")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "V", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        kind, v, t = options.one
        found, value = measure(kind, int(v), int(t), getattr(torch, options.dtype))
        sys.stdout.write(json.dumps({"extra_bytes": found.extra_bytes, "seconds": found.seconds, "loss": value}))
        return
    shared = [sys.executable, __file__, "--dtype", options.dtype, "--threads", str(options.threads)]
    sys.stdout.write(f"D = {D}, K = {K}, {options.dtype}, {options.threads} threads\n")
    sys.stdout.write(
        "| loss | V | T | extra memory, MB | time, s | tokens/s | value |\n|---|---|---|---|---|---|---|\n"
    )
    for kind, v, t in FULL if options.full else SMALL:
        done = subprocess.run([*shared, "--one", kind, str(v), str(t)], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        megabytes, seconds = row["extra_bytes"] / 1e6, row["seconds"]
        cells = f"{v:,} | {t:,} | {megabytes:,.0f} | {seconds:.2f} | {t / seconds:,.0f} | {row['loss']:.6f}"
        sys.stdout.write(f"| {kind} | {cells} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
