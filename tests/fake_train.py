"""Stands in for ``eopd train CONFIG --resume auto``, without training and without importing eopd.

    python fake_train.py FATES CONFIG --resume auto

``FATES`` is a JSON file: what becomes of a run, by its name; a run without a fate is completed. Each
call is a line of ``calls.jsonl`` beside it. The held-out number of a completed run is its learning
rate times 1e5, plus its seed, plus one for the gate ``never``.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

SETTLED = {"floor": 8, "trained_ahead": [], "lost": {}, "dropped": []}
COLLAPSED = 31  # steps
TOTALS = {"tokens": 3, "trajectories": 2, "skipped_steps": 0, "wall_s": 1.5}


def main() -> int:
    fates, file = Path(sys.argv[1]), Path(sys.argv[2])
    config = yaml.safe_load(file.read_text())
    name, batches = config["run"]["name"], config["run"]["batches"]
    run = Path(config["run"]["directory"]) / name
    run.mkdir(exist_ok=True)
    shutil.copy(file, run / "config.yaml")
    (run / "versions.json").write_text('{"eopd": "0"}')

    calls = fates.with_name("calls.jsonl")
    call = {"name": name, "options": sys.argv[3:], "pid": os.getpid()}
    call["ray"] = os.environ.get("RAY_ADDRESS")
    append(calls, call | {"began": time.time()})
    fate = json.loads(fates.read_text()).get(name, "complete")
    if fate == "fail":
        sys.stdout.write("going well so far\nerror: no luck today\nat all\n")
        return 1

    if fate == "no room":
        sys.stdout.write("error: 0 of 3 are free\n")
        shutil.rmtree(run)
        return 75

    if fate == "die":
        os.kill(os.getpid(), signal.SIGKILL)

    after = {"reverse_kl": {"mean": number(config), "standard_error": 0.1}}
    if fate == "collapse":
        for step in range(1, COLLAPSED):
            row = {"eopd_end_token_ratio": 0.9 if step <= 20 else 0.1}
            append(run / "metrics.jsonl", row | {"step": step, "eopd_repetition_ratio": step / 99})

        keep(run, {"status": "collapsed", "steps": COLLAPSED, "held_out": {"after": after}})
        return 1

    if fate == "start":  # SIGTERM finds it without a handler
        time.sleep(60)

    if fate == "wait":
        signal.sigwait({signal.SIGINT})
        keep(run, {"status": "interrupted", "steps": 1})
        return 130

    time.sleep(float(os.environ.get("FAKE_TRAIN_S", "0.2")))
    keep(run, {"status": "completed", "steps": batches, "held_out": {"after": after}})
    append(calls, {"name": name, "ended": time.time()})
    if fate == "be killed at the exit":
        os.kill(os.getpid(), signal.SIGTERM)

    return 0


def keep(run: Path, summary: dict[str, object]) -> None:
    """The summary, and the row and the checkpoint of its last step."""
    step = summary["steps"]
    row = {"step": step, "time": 0.0, "eopd_step_seconds": 1.0, "eopd_response_tokens_total": 9.0}
    append(run / "metrics.jsonl", row)
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "ledger": SETTLED} | TOTALS))
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    (run / "summary.json").write_text(json.dumps(summary))


def number(config: dict[str, dict[str, object]]) -> float:
    gate = 1.0 if config["loss"]["gate"]["kind"] == "never" else 0.0
    return config["learner"]["lr"] * 1e5 + config["run"]["seed"] + gate


def append(path: Path, row: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.exit(main())
