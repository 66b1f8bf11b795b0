"""A whole run on one GPU: an engine, a teacher and the learner share it for ten steps."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

for package in ("ray", "vllm", "deepspeed"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))

from pair import write_config, write_pair
from program import Program, read_rows

# Log-probabilities of engine and learner, both in bfloat16, on average.
MOST_GAP = 0.05

# Roles that share a GPU start one after the other, and vLLM compiles.
START_S = 900


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    write_pair(directory)
    return directory


@pytest.mark.timeout(START_S + 120)
@pytest.mark.parametrize("staleness", [0, 2])
def test_ten_steps(pair, staleness, capsys):
    name = f"staleness-{staleness}"
    config = write_config(
        pair / f"{name}.yaml", pair, run={"name": name}, flow={"max_staleness": staleness}
    )
    program = Program(models=pair, runs=pair / "runs")
    done = program.run("train", str(config), timeout_s=START_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert program.left_behind() == []

    directory = pair / "runs" / name
    rows = read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        assert row["eopd_staleness_max"] <= staleness
        assert row["eopd_weight_bytes"] > 1e9
        if staleness == 0:
            assert 0 <= row["eopd_logprob_gap_nats"] < MOST_GAP

    held_out = json.loads((directory / "summary.json").read_text())["held_out"]
    before, after = (held_out[when]["reverse_kl"]["mean"] for when in ("before", "after"))
    assert 0 < after < before
    with capsys.disabled():
        sys.stdout.write(_table(rows))


def _table(rows: list[dict[str, float]]) -> str:
    """Returns lines for ``docs/benchmarks.md``: medians of all steps but the first two."""
    steps = rows[2:]
    names = sorted(name for name in steps[0] if name.endswith(("_seconds", "_per_second", "_nats")))
    medians = (
        f"| {name} | {statistics.median(row[name] for row in steps):.4g} |"
        for name in names
        if all(name in row for row in steps)
    )
    return "\n".join(["", f"| median of {len(steps)} steps | |", "|---|---|", *medians, ""])
