"""The memory that ``eopd plan`` reckons for a learner's rank, beside what a rank takes.

One learner alone, in a process of its own for each case: the growth of the memory that is its own
(``RssAnon``) after all imports. Of three figures the first two are measured, the third is what lies
between them:

    states        weights, gradients and AdamW's moments: held after a micro-batch of the second step
    peak          the most that it held in the rest of that step: a second micro-batch, and the update
    passes        activations and loss of a micro-batch, or what the update needs where that is more

Micro-batches are full. Large pieces of memory are mapped one by one (``MALLOC_MMAP_THRESHOLD_``), so
that the allocator gives them back at once. Needs the tiny and the demo's student: ``eopd models
tiny``, ``eopd models demo``.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

MODELS = Path("~/.cache/eopd/models").expanduser()
STUDENTS = {"tiny": MODELS / "tiny" / "student", "demo": MODELS / "smollm2-26-layers"}
TOKENS, PROMPT, BAR = 1024, 32, 0.15


def resident() -> int:
    """The bytes of this process's own memory; files that it has mapped do not count."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


class Peak:
    """The most resident memory of a block, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.most, self._ended = resident(), False
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended:
            self.most = max(self.most, resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()


def measure(name: str, dtype: str, *, checkpointing: bool, length: int) -> str:
    """One row of the table; runs in a process of its own."""
    import gc

    import numpy as np
    import torch
    from bench_learner import K, make_scored

    from eopd.config import LearnerConfig, LossConfig, StudentConfig
    from eopd.config.choices import choose_zero_stage
    from eopd.learner.deepspeed_backend import DeepspeedBackend
    from eopd.learner.learner import LearnerRank
    from eopd.packing import pack_batch
    from eopd.planning.architecture import read_architecture
    from eopd.planning.memory import learner_states, passes

    torch.set_num_threads(2)
    student, stage = STUDENTS[name], choose_zero_stage(ranks=1, dtype=dtype)[0]
    model = read_architecture(student)
    rng = np.random.default_rng(0)
    parts = []
    for first in (0, 100):
        batch = [
            make_scored(rng, first + index, PROMPT, length - PROMPT, model.vocabulary)
            for index in range(TOKENS // length)
        ]
        packed = pack_batch(batch, steps=1, ranks=1, token_budget=TOKENS, alpha=1.0)
        parts.append(packed.share(0))

    torch.ones(256, 256, requires_grad=True).mm(torch.ones(256, 256)).sum().backward()
    gc.collect()
    before = resident()

    settings = LearnerConfig(
        threads=2,
        zero_stage=stage,
        lr=1e-6,
        token_budget=TOKENS,
        logit_chunk_tokens=256,
        activation_checkpointing=checkpointing,
    )
    learner = LearnerRank(
        DeepspeedBackend,
        StudentConfig(model=student, dtype=dtype),
        settings,
        LossConfig(top_k=K),
        temperature=1.0,
        total_batches=100,
        seed=0,
        entropy_bounds={"teacher": "mid"},
        broken=Path(os.devnull),
        rank=0,
        world_size=1,
        master_address="127.0.0.1",
        master_port=_free_port(),
    )
    learner.step(parts[0])
    learner.accumulate(parts[0])
    gc.collect()
    states = resident() - before
    with Peak() as peak:
        learner.step(parts[1])

    most = peak.most - before
    width = 4 if dtype == "float32" else 2
    held = sum(learner_states(model, settings, width).device.values())
    needed = sum(passes(model, settings, width).values())
    label = f"{name}, {dtype}" + (", checkpointing" if checkpointing else "")
    pairs = [(held, states), (needed, most - states), (held + needed, most)]

    return f"| {label} | {' | '.join(cells(*pair) for pair in pairs)} |"


def cells(planned: int, measured: int) -> str:
    ratio = planned / measured
    verdict = "pass" if abs(ratio - 1) <= BAR else "MISS"
    return f"{planned / 1e6:,.1f} | {measured / 1e6:,.1f} | {ratio:.2f} ({verdict})"


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs=4, help="NAME DTYPE CHECKPOINTING LENGTH: that row alone")
    options = parser.parse_args()
    if options.case:
        name, dtype, checkpointing, length = options.case
        row = measure(name, dtype, checkpointing=checkpointing == "yes", length=int(length))
        sys.stdout.write(row + "\n")
        return

    say("| learner | states planned, MB | measured | ratio | passes | | | peak | | |")
    say("|---" * 10 + "|")
    cases = [
        ("tiny", "float32", "no", "64"),
        ("demo", "float32", "no", "64"),
        ("demo", "float32", "yes", "64"),
        ("demo", "bfloat16", "no", "64"),
    ]
    for case in cases:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--case", *case],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        say([line for line in done.stdout.splitlines() if line.startswith("|")][-1])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
