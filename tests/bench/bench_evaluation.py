"""What an evaluation costs a run: the steps beside a benchmark, against the others of the same run.

Engines write for both, so that a run may lose the time in which a benchmark's own tokens are
written, and no more. That time is what the benchmark takes after training, when nobody else asks
the engines. Held-out prompts, for which the learner waits, are measured between the steps, and are
not in them. The first steps, which warm everything up, are left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "system"))
from program import Program, read_rows  # noqa: E402

from eopd.models.tiny import write_tiny_pair  # noqa: E402

WARM_UP = 4
PARTS = ("wait", "train", "weights")


def settings(options: argparse.Namespace) -> list[str]:
    """The run: a benchmark every few batches, engines and learner at work at the same time."""
    benchmark = (
        "{name: arithmetic, data: configs/prompts/arithmetic.jsonl, grader: math, "
        f"samples: {options.samples}, prompts: {options.prompts}, every: {options.every}}}"
    )
    return [
        f"run.batches={options.batches}",
        f"flow={{batch_prompts: 16, max_staleness: {options.staleness}}}",
        f"evaluation={{prompts: 8, max_response_tokens: 24, benchmarks: [{benchmark}]}}",
        "checkpoint.every=10000",
    ]


def show(name: str, rows: list[dict[str, float]]) -> float:
    """Prints what steps took, in the middle; returns it."""
    middle = {
        part: statistics.median(row[f"eopd_{part}_seconds"] for row in rows)
        for part in ("step", *PARTS)
    }
    waited = statistics.median(row["eopd_eval_wait_seconds"] for row in rows)
    parts = ", ".join(f"{part} {middle[part]:.2f}" for part in PARTS)
    sys.stdout.write(
        f"{name}: {len(rows)} steps of {middle['step']:.2f} s: {parts}, of which "
        f"{waited:.2f} for answers\n"
    )
    return middle["step"]


def main() -> None:
    """One run, the two kinds of its steps, and the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--staleness", type=int, default=2)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        program = Program(models=Path(temporary, "models"), runs=Path(temporary, "runs"))
        write_tiny_pair(program.models)
        done = program.run(*program.train("evaluated", *settings(options)))
        assert done.returncode == 0, done.stdout + done.stderr
        rows = read_rows(program.runs / "evaluated" / "metrics.jsonl")[WARM_UP:]
        measured = read_rows(program.runs / "evaluated" / "evaluations.jsonl")

    # the step that goes on beside a benchmark comes after the step whose weights it measures
    beside = show("beside", [row for row in rows if row["step"] % options.every == 1])
    others = show("others", [row for row in rows if row["step"] % options.every != 1])
    (alone,) = (
        one["seconds"] for one in measured if (one["name"], one["phase"]) == ("arithmetic", "after")
    )
    lost = max(0.0, beside - others)
    verdict = "ok" if lost <= alone else "MISS"
    sys.stdout.write(
        f"a step beside a benchmark takes {beside / others:.2f} of another one; {lost:.2f} s are "
        f"lost, at most the {alone:.2f} s that its answers take alone: {verdict}\n"
    )
    sys.stdout.write(json.dumps({"ratio": beside / others, "lost": lost, "alone": alone}) + "\n")
    sys.exit(lost > alone)


if __name__ == "__main__":
    main()
