"""One directory is one resumable run: what a checkpoint holds, written whole or not at all.

    runs/<name>/checkpoints/step-000050/
        learner/      what the learner ranks write: weights, optimiser, schedule, random state
        state.json    what the driver knows: completed batches, ledger, totals
A checkpoint is written beside its place and renamed when complete, so that a directory of that name is always one to
resume from.
"""

import json
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's part of a checkpoint."""

    step: int
    tokens: int
    trajectories: int
    skipped_steps: int
    wall_s: float
    ledger: Mapping[str, object]

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read back what ``write_checkpoint`` wrote."""
        return cls(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


async def write_checkpoint(
    root: Path, state: DriverState, save: Callable[[Path], Awaitable[None]], *, keep_last: int
) -> Path:
    """Write ``root/step-NNNNNN`` and remove all but the newest ``keep_last``; ``save`` writes the learner's part."""
    final = root / f"step-{state.step:06d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    await save(partial / "learner")
    (partial / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(root.glob("step-*"))
