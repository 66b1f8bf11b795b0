"""What ``run.upload`` costs the steps of a run: the same tiny run with it and without, with a
checkpoint at every step unless ``--every`` says otherwise. The store is the S3 server of the tests,
on the same cores.

The runs are made in the order without, with, with, without, so that a machine that slows down or
warms up is no part of the ratio. A step lasts from one row to the next, and so has its checkpoint
in it. The first steps, which warm everything up, are left out.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "system")]
from program import Program, read_rows  # noqa: E402
from store import BUCKET, open_store  # noqa: E402

from eopd.models.tiny import write_tiny_pair  # noqa: E402

WARM_UP = 4


def step_seconds(program: Program, name: str, *settings: str) -> list[float]:
    """The seconds of the steps of one run."""
    small = ("rollout.engines=1", "learner.ranks=1", "evaluation.prompts=4")
    done = program.run(*program.train(name, *small, *settings))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(program.runs / name / "metrics.jsonl")[WARM_UP:]
    assert rows[-1].get("eopd_upload_failures_total", 0) == 0
    newest = rows[-1].get("eopd_uploaded_step", 0)
    sys.stdout.write(f"{name}: checkpoint {newest:.0f} is up before the last step\n")
    return [after["time"] - before["time"] for before, after in itertools.pairwise(rows)]


def main() -> None:
    """The four runs, and the ratio of the two kinds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"without": [], "with": []}

    with tempfile.TemporaryDirectory() as temporary, open_store() as store:
        os.environ.update(store.environment)
        program = Program(models=Path(temporary, "models"), runs=Path(temporary, "runs"))
        write_tiny_pair(program.models)
        for number, kind in enumerate(("without", "with", "with", "without")):
            settings = [f"run.batches={options.batches}", f"checkpoint.every={options.every}"]
            settings += [f"run.upload=s3://{BUCKET}/runs"] if kind == "with" else []
            seconds[kind] += step_seconds(program, f"{kind}-{number}", *settings)

        checkpoint = max((program.runs / "with-1" / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    sys.stdout.write(
        f"a checkpoint of {size / 1e6:.1f} MB every {options.every} steps: a step takes "
        f"{middle['with']:.3f} s with run.upload, {middle['without']:.3f} s without, "
        f"{middle['with'] / middle['without']:.2f} times as long (means "
        f"{statistics.mean(seconds['with']):.3f} and {statistics.mean(seconds['without']):.3f})\n"
    )


if __name__ == "__main__":
    main()
