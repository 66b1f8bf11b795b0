"""The batch scripts of cluster/slurm, with programs on PATH that stand for Slurm's, Ray's and ours. Nothing
was run on Slurm.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "cluster" / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
SECONDS = 30.0  # for a thing that takes a tenth of one

# Each program writes what it was called with. What stays until it is ended waits in small steps, since
# a shell takes a signal only between two commands.
FAKES = {
    "eopd": """
        trap 'echo "eopd got USR1" >>"$CALLS"; [ -n "$HANGS" ] || exit "$EXIT_CODE"' USR1
        trap 'echo "eopd got TERM" >>"$CALLS"; exit "$EXIT_CODE"' TERM
        [ -z "$ENDS_AT_ONCE" ] || exit "$EXIT_CODE"
        while :; do sleep 0.05; done
    """,
    "ray": """
        case "$*" in
        "start --head "*)
            [ -z "$HEAD_FAILS" ] || exit 1
            touch "$FOLDER/head"
            trap 'echo "head ended" >>"$CALLS"; exit' TERM
            while :; do sleep 0.05; done ;;
        health-check*) [ -e "$FOLDER/head" ] ;;
        status*)
            echo "Active:"
            for node in $(cat "$FOLDER"/joined-* 2>/dev/null) first; do echo " 1 node_$node"; done
            touch "$FOLDER/asked" ;;
        esac
    """,
    "srun": """
        trap 'echo "workers ended" >>"$CALLS"; exit' TERM
        while [ ! -e "$FOLDER/asked" ]; do sleep 0.05; done
        echo "second third" >"$FOLDER/joined-workers"
        while :; do sleep 0.05; done
    """,
    "scontrol": """
        [ "$1" != show ] || printf 'first\\nsecond\\nthird\\n'
    """,
    "rm": "",
    "sleep": """
        exec {sleep} 0.05
    """,
}


@pytest.fixture
def job(tmp_path):
    """Runs a batch script as Slurm does: a copy of it, in the folder of the checkout."""
    programs, checkout = tmp_path / "bin", tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "activate").write_text(f"PATH={programs}:$PATH\n")
    shutil.copytree(SLURM, checkout / "cluster" / "slurm")
    programs.mkdir()
    for name, text in FAKES.items():
        said = "" if name == "sleep" else f'echo "{name} $*" >>"$CALLS"\n'
        body = text.replace("{sleep}", shutil.which("sleep"))
        (programs / name).write_text(f"#!/bin/bash\n{said}{body}\n")
        (programs / name).chmod(0o755)

    started = Started(tmp_path, checkout)
    yield started
    if started.process is not None and started.process.poll() is None:
        os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()


class Started:
    def __init__(self, folder, checkout):
        self.folder, self.checkout, self.process = folder, checkout, None
        self.calls_file = folder / "calls"
        self.calls_file.touch()

    def start(self, script, *, nodes=1, **settings):
        copied = self.folder / "slurm_script"
        shutil.copy(SLURM / script, copied)
        defaults = {"EXIT_CODE": "130", "ENDS_AT_ONCE": "", "HANGS": "", "HEAD_FAILS": ""}
        defaults["LEAST_SECONDS"] = "0"
        slurm = {
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "64",
        }
        places = {"CALLS": str(self.calls_file), "FOLDER": str(self.folder)}
        self.process = subprocess.Popen(
            ["bash", str(copied), "configs/tiny.yaml", "--set", "run.name=x"],
            cwd=self.checkout,
            env={"PATH": os.environ["PATH"], **defaults, **slurm, **places, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def calls(self):
        return self.calls_file.read_text().splitlines()

    def until(self, call):
        deadline = time.monotonic() + SECONDS
        while not any(line.startswith(call) for line in self.calls()):
            assert time.monotonic() < deadline, f"no {call} in {self.calls()}"
            time.sleep(0.02)

    def end(self):
        """The exit code, and what was written."""
        written, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, written


TRAIN = "eopd train configs/tiny.yaml --set run.name=x --resume auto"


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_job_whose_time_is_up_ends_with_a_checkpoint_and_is_queued_again(script, job):
    job.start(script)
    job.until(TRAIN)
    time.sleep(0.2)  # the driver has its handlers
    job.process.send_signal(signal.SIGUSR1)  # to the batch script alone, as B: asks for
    code, written = job.end()
    assert job.calls()[-1] == "scontrol requeue 42"
    assert job.calls().index("eopd got USR1") > job.calls().index(TRAIN)
    assert (code, "job 42 is queued again" in written) == (130, True)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_job_whose_time_is_up_at_once_is_not_queued_again_for_ever(script, job):
    job.start(script, LEAST_SECONDS="1800")
    job.until(TRAIN)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGUSR1)
    code, written = job.end()
    assert (code, "job 42 is not queued again. Submit it with a --time" in written) == (130, True)
    assert "scontrol requeue 42" not in job.calls()


def test_a_time_that_is_up_while_nodes_join_ends_ray(job):
    job.start("many-nodes.sbatch", nodes=4)
    job.until("ray status")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 130
    assert {"head ended", "scontrol requeue 42"} <= set(job.calls())
    assert TRAIN not in job.calls()


def test_the_time_that_is_up_twice_is_handed_on_twice(job):
    job.start("one-node.sbatch", HANGS="yes")
    job.until(TRAIN)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGUSR1)
    job.until("eopd got USR1")
    assert job.process.poll() is None, "the script waits for its driver"
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 130


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"ENDS_AT_ONCE": "yes", "EXIT_CODE": "0"}, 0),
        ({"ENDS_AT_ONCE": "yes", "EXIT_CODE": "2"}, 2),
        ({"ENDS_AT_ONCE": "yes", "EXIT_CODE": "130"}, 130),  # by `eopd stop`
    ],
    ids=["done", "a mistake", "stopped"],
)
def test_a_driver_that_ends_by_itself_is_not_queued_again(how, code, job):
    job.start("one-node.sbatch", **how)
    assert job.end()[0] == code
    assert job.calls() == [TRAIN]


def test_a_failure_after_the_signal_is_not_queued_again(job):
    job.start("one-node.sbatch", EXIT_CODE="1")
    job.until(TRAIN)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 1
    assert job.calls() == [TRAIN, "eopd got USR1"]


def test_a_job_that_is_taken_away_ends_with_a_checkpoint_and_leaves_the_rest_to_slurm(job):
    job.start("one-node.sbatch")
    job.until(TRAIN)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 130
    assert job.calls() == [TRAIN, "eopd got TERM"]


def test_several_nodes_head_then_workers_then_driver_then_their_end(job):
    job.start("many-nodes.sbatch", nodes=3)
    job.until(TRAIN)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 130
    calls = job.calls()
    order = [  # of what is repeated, the last: the head answers once it is there
        max(index for index, call in enumerate(calls) if re.match(pattern, call))
        for pattern in (
            "scontrol show hostnames n",
            "ray start --head --port=6379 .*--num-cpus=64 .*--block$",
            "srun --nodes=2 --ntasks=2 --exclude=first .* ray start --address=first:6379 .*--block$",
            TRAIN,
            "eopd got USR1",
            "scontrol requeue 42",
        )
    ]
    assert order == sorted(order)
    answered = max(i for i, call in enumerate(calls) if call.startswith("ray health-check"))
    assert answered < order[2], "workers start once the head answers"
    assert calls.index("scontrol requeue 42") == len(calls) - 1
    assert {"head ended", "workers ended"} <= set(calls)
    assert "rm -rf /tmp/ray-42" in calls
    asked = [call for call in calls[: calls.index(TRAIN)] if call.startswith("ray status")]
    assert len(asked) > 1, "the driver waited for nodes that had not joined"


def test_a_head_that_does_not_start_ends_the_job_before_any_driver(job):
    job.start("many-nodes.sbatch", nodes=3, HEAD_FAILS="yes")
    code, written = job.end()
    assert (code, "Ray has ended before the head answered" in written) == (1, True)
    assert not any(call.startswith(("srun", "eopd", "scontrol requeue")) for call in job.calls())


def test_nodes_that_do_not_join_in_time_end_the_job(job):
    job.start("many-nodes.sbatch", nodes=4, JOIN_SECONDS="3")
    code, written = job.end()
    assert (code, "the time is over before all 4 nodes had joined" in written) == (1, True)
    assert "head ended" in job.calls()
    assert TRAIN not in job.calls()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_asks_slurm_for_what_it_relies_on(script):
    text = script.read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert options.keys() >= {"requeue", "exclusive", "time", "gpus-per-node"}
    assert options["open-mode"] == "append"  # a second attempt keeps the log of the first
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert (
        f"sbatch{' --nodes=4' if 'many' in script.name else ''} cluster/slurm/{script.name}" in text
    )
    assert "Not yet run." in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here (Debian has it)")
def test_shellcheck_finds_nothing_in_the_scripts_of_cluster():
    scripts = [*SCRIPTS, SLURM / "drive.sh", *sorted((ROOT / "cluster").glob("*.sh"))]
    names = [str(path.relative_to(ROOT)) for path in scripts]
    command = ["shellcheck", "--external-sources", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
