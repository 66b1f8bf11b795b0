"""A run on a processor without bfloat16, and a fork of it under a rate that tears its student apart."""

import json
import re
from pathlib import Path

import pytest
import yaml
from program import read_rows

pytestmark = pytest.mark.slow

# What oneDNN and torch take for a processor's best; forward and backward in bfloat16 are then 120
# times as slow.
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="module")
def without_bfloat16(program) -> Path:
    """A run of 15 steps on a processor without bfloat16."""
    settings = (
        "run.batches=15",
        "student.dtype=auto",
        "teachers.0.dtype=auto",
        "rollout.engines=1",
        "learner.ranks=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AVX2_ALONE.items():
            patch.setenv(name, value)

        done = program.run(*program.train("avx2", *settings))

    assert done.returncode == 0, done.stdout + done.stderr
    return program.runs / "avx2"


def test_a_processor_without_bfloat16_trains_in_float32(without_bfloat16):
    directory = without_bfloat16
    config = yaml.safe_load((directory / "config.yaml").read_text())

    for model in (config["student"], *config["teachers"]):
        assert model["dtype"] == "float32"
        assert "keeps bfloat16 instructions from use" in model["dtype_reason"]

    assert all(
        row["eopd_logprob_gap_nats"] < 1e-3 for row in read_rows(directory / "metrics.jsonl")
    )
    held_out = json.loads((directory / "summary.json").read_text())["held_out"]
    assert held_out["after"]["reverse_kl"]["mean"] < 0.5 * held_out["before"]["reverse_kl"]["mean"]


def test_a_fork_goes_on_under_another_rate_which_tears_its_student_apart(program, without_bfloat16):
    """With a fresh optimiser. That the steps of the parent were sound, the guard of the fork knows."""
    parent = without_bfloat16
    before = (parent / "metrics.jsonl").read_bytes()
    settings = ("learner.lr=0.1", "run.batches=30", "guard.on_collapse=stop")
    options = [part for setting in settings for part in ("--set", setting)]
    done = program.run(
        "fork",
        str(parent),
        "--name",
        "torn",
        *options,
        "--fresh-optimizer",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = (done.stdout + done.stderr).replace("\n", " ")
    assert "goes on from step 15 of avx2; optimiser fresh" in said
    assert "from step 16: learner.lr 0.002 -> 0.1" in said
    assert (parent / "metrics.jsonl").read_bytes() == before

    directory = program.runs / "torn"
    rows = read_rows(directory / "metrics.jsonl")
    last = rows[-1]["step"]
    assert rows[:15] == read_rows(parent / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert rows[15]["eopd_learning_rate"] == pytest.approx(0.1)
    issues = [issue for row in read_rows(directory / "trained.jsonl") for issue in row["issues"]]
    assert sorted(issues) == list(range(8 * last))
    assert json.loads((directory / "parent.json").read_text())["step"] == 15

    # those of step 16 were still written by the weights of the parent, and ten it takes
    assert 26 <= last < 30
    assert [row["eopd_collapse"] for row in rows] == [0.0] * (last - 1) + [1.0]
    assert said.count(f"the student collapses: over steps {last - 9} to {last}, compared with") == 1
    # which of the two signs is first, depends on the processor's numerics
    torn = "it is further from the teacher than before it learned anything"
    assert torn in said or "fewer responses end by themselves, and they repeat more" in said
    (way_back,) = set(re.findall(r"go back with --resume --step (\d+)", said))
    assert int(way_back) <= 20
    assert (directory / "checkpoints" / f"step-{int(way_back):06d}").is_dir()
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("collapsed", last)
