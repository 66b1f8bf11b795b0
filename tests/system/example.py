"""The project in ``examples/``: where it is, and what shows that its functions took part in a run."""

import json
from pathlib import Path

from program import Program, read_rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "letters"
KEYS = ("flow.filter", "loss.gate", "loss.reverse_kl.reward", "prompts.data.0")


def settings(program: Program, runs: Path) -> list[str]:
    values = [
        f"run.directory={runs}",
        f"student.model={program.models / 'student'}",
        f"teachers.0.model={program.models / 'teacher'}",
    ]
    return [part for value in values for part in ("--set", value)]


def require_its_functions_took_part(run: Path) -> None:
    """Its rewards are fractions, its filter drops some, its gate opens on some tokens."""
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 6)

    rows = read_rows(run / "metrics.jsonl")
    rewards = [row["eopd_reward_mean"] for row in rows]
    assert all(0.05 <= reward < 1.0 for reward in rewards)
    # a mean of 16 rewards from {0.05, 1/4, 1/2, 3/4, 1}: not one of noughts and ones
    assert any((16 * reward) % 1 > 0.01 for reward in rewards)
    assert {row["eopd_reward_missing_ratio"] for row in rows} == {0.0}
    assert any(0.0 < row["eopd_gate_ratio"] < 1.0 for row in rows)
    assert max(row["eopd_dropped_trajectories_total"] for row in rows) == 0

    dropped = read_rows(run / "dropped.jsonl")
    assert rows[-1]["eopd_filtered_trajectories_total"] <= len(dropped)
    assert {row["reason"] for row in dropped} <= {"filtered"}
    trained = [issue for row in read_rows(run / "trained.jsonl") for issue in row["issues"]]
    settled = sorted([*trained, *(row["issue"] for row in dropped)])
    assert len(set(settled)) == len(settled), "each is trained or filtered, once"

    measured = read_rows(run / "evaluations.jsonl")
    graded = [row for row in measured if row["name"] == "all-letters"]
    assert [row["step"] for row in graded] == [0, 3, 6]
    assert all(0.0 <= row["measurements"]["avg_at_n"]["mean"] <= 1.0 for row in graded)

    versions = json.loads((run / "versions.json").read_text())
    for key in KEYS:
        assert versions[f"{key}.function"].startswith("letters.")
        assert ", sha256 " in versions[f"{key}.function"]
