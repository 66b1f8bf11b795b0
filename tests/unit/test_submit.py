"""``eopd submit``: what a job is given, what it is asked for, and how its end is told."""

import http.server
import itertools
import json
import shlex
import socket
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import fakes
import pytest

from eopd.config import ConfigError
from eopd.run import provenance
from eopd.runtime import job_files, jobs
from eopd.runtime.jobs import Jobs, connect, server_address

URL = "http://head:8265"
SECRET = "s3cret-value"
KEYED = "[{model: /m/t, backend: eopd, server: {url: 'http://s:1', api_key_env: TEACHER_KEY}}]"


class FakeClient:
    """Ray's job client, with one job, as far as it is used.

    ``log`` is what the job writes, an exception among it a connection that is cut; the states of
    the job come one after the other, the last for good.
    """

    def __init__(self, log=("hello\n",), states=(("SUCCEEDED", 0),), **details):
        self.log, self.states, self.details = list(log), list(states), details
        self.faults = iter(())  # of the next submissions
        self.asked, self.uploaded, self.stopped, self.tails = {}, {}, [], 0

    def submit_job(self, **asked):
        if (fault := next(self.faults, None)) is not None:
            raise fault

        self.asked = asked
        folder = job_files.Path(asked["runtime_env"]["working_dir"])
        files = [file for file in folder.rglob("*") if file.is_file()]
        self.uploaded = {str(file.relative_to(folder)): file.read_text() for file in files}
        return asked["submission_id"] or "raysubmit_1"

    def get_job_info(self, name):
        if name == "nobody":
            raise RuntimeError("Request failed with status code 404: Job nobody does not exist.")

        status, code = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        runtime_env = {"env_vars": {jobs.STOP_WAIT: "3600"}}
        fields = {"runtime_env": runtime_env, "message": "", "entrypoint": "eopd"}
        fields["metadata"] = self.asked.get("metadata", {})
        return SimpleNamespace(
            **(fields | self.details), status=SimpleNamespace(value=status), driver_exit_code=code
        )

    def get_job_logs(self, name):
        return "".join(text for text in self.log if isinstance(text, str))

    async def tail_job_logs(self, name):
        self.tails += 1
        for index, text in enumerate(self.log):
            if isinstance(text, str):
                yield text
            else:
                del self.log[index]
                raise text

    def stop_job(self, name):
        self.stopped.append(name)
        return True


@pytest.fixture
def client(monkeypatch):
    """The client of the cluster that every command finds."""
    fake = FakeClient()
    monkeypatch.setattr(jobs, "connect", lambda address: Jobs(fake, address))
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    for name in (jobs.API_ADDRESS, "RAY_ADDRESS", "TEACHER_KEY"):
        monkeypatch.delenv(name, raising=False)

    return fake


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with a config, whose models and runs lie elsewhere."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(project, **sections):
    models = {"student": "{model: /m/s}", "teachers": "[{model: /m/t}]"}
    return fakes.write_config(project, **(models | sections)).name


@pytest.fixture
def submit(eopd, client):
    """Submit a config with options: ``submit("c.yaml", "--no-wait")``."""
    return lambda *words: eopd("submit", "--address", URL, *words)


# --- what is uploaded


def put(project, *names, text="x"):
    for name in names:
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_the_config_names_is_uploaded_and_nothing_else(project, client, submit):
    put(project, "data/a.jsonl", "data/b.jsonl", "words.txt", "data/unnamed.jsonl")
    put(project, "runs/old/metrics.jsonl", ".git/HEAD", ".venv/x.py", "models/model.safetensors")
    put(
        project,
        "mine/gates.py",
        text="def f():\n    import helper\n    import json\n    import os.path",
    )
    put(project, "mine/sub/table.csv", "mine/__pycache__/gates.pyc", "mine/.hidden", "other.py")
    put(project, "helper.py", text="from mine import gates\nfrom . import x\nimport eopd.plugins")
    put(project, "json/__init__.py", "eopd/__init__.py", "unused/__init__.py", text="")
    more = (
        "loss: {gate: {kind: custom, function: 'mine.gates:f', options: {words: words.txt}}}\n"
        "evaluation: {benchmarks: [{name: b, data: data/b.jsonl, grader: exact}]}\n"
    )
    config = write(project, prompts="{data: ./data/a.jsonl, held_out: owner/set}", more=more)

    done = submit(config)
    assert done.code == 0, done.err
    named = {"c.yaml", "data/a.jsonl", "data/b.jsonl", "words.txt"}
    assert set(client.uploaded) == named | {"mine/gates.py", "mine/sub/table.csv", "helper.py"}
    assert client.uploaded["c.yaml"] == (project / "c.yaml").read_text()


def test_files_that_overrides_and_options_name_are_uploaded(project, client, submit):
    put(project, "other.jsonl", "extra/deep/table.csv", "extra/.git/HEAD", "one.txt")
    done = submit(
        write(project),
        *("--set", "prompts.data=other.jsonl", "--include", "extra", "--include", "one.txt"),
    )
    assert done.code == 0, done.err
    assert set(client.uploaded) == {"c.yaml", "other.jsonl", "extra/deep/table.csv", "one.txt"}


def test_a_config_from_elsewhere_lies_at_the_top_and_absolute_paths_stay(project, client, submit):
    (project.parent / "shared").mkdir()
    rows = project.parent / "shared" / "rows.jsonl"
    rows.write_text("{}")
    write(project.parent, prompts=f"{{data: {rows}, held_out: ~/rows.jsonl}}")

    assert submit("../c.yaml").code == 0
    assert set(client.uploaded) == {"c.yaml"}
    assert shlex.split(client.asked["entrypoint"]) == ["eopd", "train", "c.yaml"]


def test_what_a_config_extends_goes_with_it(project, client, submit):
    put(project, "recipes/base.yaml", text=(project / write(project)).read_text())
    put(project, "recipes/own.yaml", text="extends: base.yaml\nprompts: {data: rows.jsonl}\n")
    put(project, "rows.jsonl")
    done = submit("recipes/own.yaml")
    assert done.code == 0, done.err
    assert set(client.uploaded) == {"recipes/base.yaml", "recipes/own.yaml", "rows.jsonl"}
    assert shlex.split(client.asked["entrypoint"]) == ["eopd", "train", "recipes/own.yaml"]


def test_what_is_extended_must_lie_in_the_working_directory(project, client, submit):
    write(project.parent)
    put(project, "own.yaml", text="extends: ../c.yaml\n")
    done = submit("own.yaml")
    assert (done.code, client.asked) == (2, {})
    assert "extends: ../c.yaml lies outside the working directory" in done.err


def test_a_module_that_is_installed_elsewhere_is_not_uploaded(project, client, submit, monkeypatch):
    installed = project.parent / "installed"
    for folder in (project, installed):
        put(folder, "rewards_of_mine.py", text="")

    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    more = "loss: {gate: {kind: custom, function: 'rewards_of_mine:f'}}\n"
    assert submit(write(project, more=more)).code == 0
    assert set(client.uploaded) == {"c.yaml"}


def test_the_program_itself_is_not_uploaded_from_its_checkout(monkeypatch):
    monkeypatch.chdir(job_files.Path(__file__).parents[2])
    assert job_files._modules(["eopd.plugins:load"]) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.directory=runs", "run.directory: runs is relative, so a job would write into its"),
        ("run.directory=./x", "run.directory: ./x is relative"),
        ("telemetry.discovery=targets", "telemetry.discovery: targets is relative, so a job would"),
        (
            "student.model=models/s",
            "student.model: models/s is a relative path, and models are not",
        ),
        ("teachers.0.model=owner/here", "teachers.0.model: owner/here is a relative path"),
        ("rollout.vllm={speculative_config: {model: owner/here}}", "config.model: owner/here is a"),
        ("prompts.data=no.jsonl", "prompts.data: no.jsonl cannot be read here, to be uploaded"),
        (
            "prompts.held_out=[b, no.parquet]",
            "prompts.held_out.1.data: no.parquet cannot be read here",
        ),
        (
            "prompts.data=../project/in.jsonl",
            "prompts.data: ../project/in.jsonl leads out of the working directory first; write in.j",
        ),
        ("prompts.data=../out.jsonl", "prompts.data: ../out.jsonl lies outside the working direct"),
        ("cluster.cpus=2", "cluster.cpus: 2 is for Ray started by a run, and a job joins the clus"),
        ("learner.lr=fast", "learner.lr: must be a number"),
    ],
)
def test_what_no_job_can_use_is_a_mistake(project, client, submit, override, message):
    put(project, "owner/here/config.json", "../out.jsonl", "in.jsonl")
    done = submit(write(project), "--set", override)
    assert (done.code, client.asked) == (2, {})
    assert message in done.err


def test_a_run_directory_that_is_not_named_is_relative_too(project, submit):
    config = project / write(project)
    config.write_text(config.read_text().replace(f", directory: {project}/runs", ""))
    done = submit(config.name)
    assert done.code == 2
    assert "run.directory: runs is relative" in done.err


def test_too_many_bytes_are_one_message_with_the_largest_files(
    project, client, submit, monkeypatch
):
    monkeypatch.setattr(job_files, "MOST_BYTES", 2 << 20)
    put(project, "large.jsonl", text="x" * (2 << 20))
    put(project, "small.jsonl")
    done = submit(write(project, prompts="{data: large.jsonl, held_out: small.jsonl}"))
    assert (done.code, client.asked) == (2, {})
    assert "the files of the job have 2 MiB, and Ray's job server takes 2: name the" in done.err
    assert "sees: large.jsonl (2 MiB), " in done.err


def test_a_module_that_is_no_python_and_a_missing_folder_are_mistakes(project, submit):
    put(project, "broken.py", text="def f(:")
    more = "loss: {gate: {kind: custom, function: 'broken:f'}}\n"
    done = submit(write(project, more=more))
    assert (done.code, done.err.startswith("error: broken.py: is no Python")) == (2, True)
    done = submit(write(project), "--include", "nowhere")
    assert (done.code, "--include nowhere: there is no such file" in done.err) == (2, True)


def test_a_link_to_a_folder_or_to_nothing_is_not_left_out_in_silence(project, submit):
    put(project, "extra/one.txt")
    link = project / "extra/linked"
    link.symlink_to("nowhere")
    done = submit(write(project), "--include", "extra")
    assert (done.code, "extra/linked: is a link to nothing, so the" in done.err) == (2, True)
    link.unlink()
    link.symlink_to(project)
    done = submit(write(project), "--include", "extra")
    assert (done.code, "extra/linked: is a link to a folder, and such" in done.err) == (2, True)


# --- what the job is asked for


def test_quoting_survives_and_a_stop_is_given_time(project, client, submit):
    values = ['prompts.system=it\'s "odd" $HOME; ls', "prompts.suffix=two  words"]
    settings = [word for value in values for word in ("--set", value)]
    done = submit("--resume", write(project), *settings, "--name", "my-job")
    assert done.code == 0, done.err
    words = shlex.split(client.asked["entrypoint"])
    assert words == ["eopd", "train", "c.yaml", *settings, "--resume"]
    assert client.asked["submission_id"] == "my-job"
    again = ["eopd", "submit", "c.yaml", *settings, "--address", URL, "--resume", "auto"]
    assert client.asked["metadata"] == {
        "eopd_run": f"{project}/runs/r",
        "eopd_again": shlex.join(again),
    }
    assert client.asked["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "3600"}


def test_resume_auto_is_handed_on(project, client, submit):
    submit(write(project), "--resume", "auto")
    assert shlex.split(client.asked["entrypoint"])[-2:] == ["--resume", "auto"]


def test_a_name_that_is_no_id_is_a_mistake(project, client, submit):
    done = submit(write(project), "--name", "a/b")
    assert (done.code, client.asked) == (2, {})
    assert "--name: must be letters, digits" in done.err


def test_secrets_go_by_name_and_are_never_shown(project, client, submit, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TEACHER_KEY", f"{SECRET}-of-teacher")
    client.states = [("FAILED", 1)]
    done = submit(write(project, teachers=KEYED), "--env", "HF_TOKEN")
    variables = client.asked["runtime_env"]["env_vars"]
    assert variables["HF_TOKEN"] == SECRET
    assert variables["TEACHER_KEY"] == f"{SECRET}-of-teacher"
    assert SECRET not in done.out + done.err + client.asked["entrypoint"]
    assert SECRET not in "".join(client.uploaded.values())
    assert f"--address {URL} --resume auto --env HF_TOKEN" in done.err


@pytest.mark.parametrize("commit", ["0123abc-dirty", None])
def test_a_job_is_told_the_commit_that_it_was_submitted_from(
    project, client, submit, monkeypatch, commit
):
    monkeypatch.setattr(provenance, "commit_of", lambda directory: commit)
    assert submit(write(project)).code == 0
    assert client.asked["runtime_env"]["env_vars"].get("EOPD_COMMIT") == commit


def test_a_key_that_is_not_set_here_is_said(project, client, submit):
    done = submit(write(project, teachers=KEYED))
    assert done.code == 0
    said = "note: teachers.teacher.server.api_key_env: TEACHER_KEY is not set here; it must be set"
    assert said in done.err
    assert "TEACHER_KEY" not in client.asked["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"HF_TOKEN={SECRET}", "--env HF_TOKEN=...: takes the name alone, since a command line"),
        ("NOT_SET_HERE", "--env NOT_SET_HERE: this variable is not set here"),
        ("a b", "--env a b: must be the name of an environment variable"),
        ("DOLLAR", "--env: the value of DOLLAR has a $ before a name, which Ray would fill in"),
    ],
)
def test_variables_that_cannot_be_given_are_mistakes(
    project, client, submit, monkeypatch, option, message
):
    monkeypatch.setenv("DOLLAR", f"{SECRET}$HOME")
    done = submit(write(project), "--env", option)
    assert (done.code, client.asked) == (2, {})
    assert message in done.err
    assert SECRET not in done.out + done.err


# --- how its end is told


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (("SUCCEEDED", 0), 0),
        (("FAILED", 1), 1),
        (("FAILED", 2), 2),
        (("FAILED", 130), 130),
        (("FAILED", -9), 137),
        (("FAILED", None), 1),
        (("STOPPED", None), 130),
    ],
)
def test_the_exit_code_is_that_of_the_job(project, client, submit, state, code):
    client.states, client.details = [("RUNNING", None), state], {"message": "no such package"}
    done = submit(write(project))
    assert done.code == code
    assert f"job raysubmit_1 has ended: {state[0]}, exit code {code}" in done.err
    assert ("Ray says: no such package" in done.err) == (state == ("FAILED", None))
    again = f"continue with: eopd submit c.yaml --address {URL} --resume auto"
    assert (again in done.err) == (code not in (0, 2))


def test_a_job_whose_shell_finds_no_eopd_is_told_the_cure(project, client, submit):
    client.states = [("RUNNING", None), ("FAILED", 127)]
    done = submit(write(project))
    assert done.code == 127
    assert "found no eopd: start Ray, on every node, in the environment" in done.err
    assert "continue with" not in done.err


NO_AGENT = RuntimeError(
    "Request failed with status code 500: No available agent to submit job, please try again later."
)


def test_an_id_that_was_used_before_is_a_mistake_of_the_option(project, client, submit):
    reason = "Request failed with status code 500: Traceback\nValueError: Job with submission_id j "
    client.faults = iter([RuntimeError(reason + "already exists. Please use a different one.")])
    done = submit(write(project), "--name", "j")
    assert done.code == 2
    assert done.err == (
        "error: --name: the cluster had a job j already, and takes each id once; leave --name out, "
        "or choose another id\n"
    )


def test_a_cluster_that_has_just_started_is_waited_for(project, client, submit, caplog):
    client.faults = iter([NO_AGENT, NO_AGENT])
    done = submit(write(project), "--no-wait")
    assert (done.code, done.out) == (0, "raysubmit_1\n")
    said = "the head of the cluster is not ready for jobs yet; trying again"
    assert [record.getMessage() for record in caplog.records] == [said, said]


def test_a_cluster_without_an_agent_is_one_line_in_time(project, client, submit, monkeypatch):
    monkeypatch.setattr(jobs, "AGENT_S", 0.1)
    client.faults = itertools.repeat(NO_AGENT)
    done = submit(write(project), "--no-wait")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: {URL}: the head takes no jobs: ")


def test_a_submission_that_is_refused_is_not_tried_again(project, client, submit, caplog):
    client.faults = iter([RuntimeError("Job with submission_id a already exists")])
    assert submit(write(project), "--no-wait").code == 2
    assert caplog.records == []


def test_a_connection_that_is_cut_is_made_again_and_nothing_comes_twice(project, client, submit):
    client.log = ["one\n", "tw", RuntimeError("WebSocket error"), "o\n", OSError(), "three\n"]
    client.states = [("RUNNING", None)] * 2 + [("SUCCEEDED", 0)]
    done = submit(write(project))
    assert (done.code, done.out, client.tails) == (0, "one\ntwo\nthree\n", 3)


def test_a_log_that_cannot_be_read_is_said_once_and_the_end_is_waited_for(
    project, client, submit, caplog
):
    client.log = [RuntimeError("no agent")] * 3
    client.states = [("RUNNING", None)] * 3 + [("SUCCEEDED", 0)]
    assert submit(write(project)).code == 0
    said = "the log of job raysubmit_1 was cut: no agent; reading on"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_server_that_is_away_for_a_while_is_waited_for(project, client, submit):
    client.log = ["one\n", OSError("cut"), "two\n"]
    client.states = [("RUNNING", None), ("SUCCEEDED", 0)]
    answers, look_up = iter([False, False, True, False]), client.get_job_info
    client.get_job_info = lambda name: (
        look_up(name) if next(answers, True) else connect("http://127.0.0.1:1")
    )
    done = submit(write(project))
    assert (done.code, done.out) == (0, "one\ntwo\n")


def test_a_server_that_is_gone_ends_the_following_alone(project, client, submit, monkeypatch):
    monkeypatch.setattr(jobs, "AWAY_S", 0.1)
    client.log = [OSError("cut")]
    client.get_job_info = lambda name: connect("http://127.0.0.1:1")
    done = submit(write(project))
    assert done.code == 1
    assert "error: http://127.0.0.1:1: no job server answers there (" in done.err
    assert "; job raysubmit_1 may go on" in done.err


def test_an_interrupt_ends_the_following_alone(project, client, submit):
    client.log = ["one\n", KeyboardInterrupt()]
    done = submit(write(project))
    assert (done.code, done.out, client.stopped) == (130, "one\n", [])
    assert "no longer following; job raysubmit_1 goes on" in done.err
    assert f"eopd stop raysubmit_1 --address {URL}" in done.err


def test_the_id_alone_goes_to_the_output_where_nobody_waits(project, client, submit):
    done = submit(write(project), "--no-wait")
    assert (done.code, done.out, client.tails) == (0, "raysubmit_1\n", 0)
    for line in (
        f"follow it with: eopd logs raysubmit_1 --address {URL} --follow",
        f"look at it with: eopd status raysubmit_1 --address {URL}",
        f"stop it, with a checkpoint: eopd stop raysubmit_1 --address {URL}",
    ):
        assert line in done.err.splitlines()


# --- verbs that take a job


def test_logs_of_a_job_are_its_last_lines_and_go_on(client, eopd):
    client.log = ["one\ntwo\n", "three\n"]
    assert eopd("logs", "j", "--address", URL, "-n", 2).out == "two\nthree\n"
    assert eopd("logs", "j", "--address", URL, "-n", 4).out == "one\ntwo\nthree\n"
    assert eopd("logs", "j", "--address", URL, "-n", 0).out == ""
    client.get_job_logs = lambda name: "one\ntwo\n"
    done = eopd("logs", "j", "--address", URL, "-n", 1, "--follow")
    assert (done.code, done.out) == (0, "two\nthree\n")
    done = eopd("logs", "j", "--address", URL, "--role", "driver")
    assert (done.code, "--role driver: goes with a run directory" in done.err) == (2, True)


def test_status_of_a_job_names_its_command_and_its_run(client, eopd, tmp_path):
    client.details = {"metadata": {"eopd_run": str(tmp_path)}, "entrypoint": "eopd train c.yaml"}
    done = eopd("status", "j", "--address", URL)
    lines = done.out.splitlines()
    assert lines[:3] == [
        "job j: SUCCEEDED",
        "command: eopd train c.yaml",
        f"run directory: {tmp_path}",
    ]
    assert f"`eopd status {tmp_path}`" in lines[3]


@pytest.mark.parametrize(
    ("state", "is_told"),
    [
        (("RUNNING", None), False),
        (("SUCCEEDED", 0), False),
        (("FAILED", 2), False),  # a mistake: the same again would fail again
        (("FAILED", 1), True),
        (("STOPPED", None), True),
    ],
)
def test_status_of_a_job_says_what_continues_it(client, eopd, state, is_told):
    client.states, client.details = [state], {"metadata": {"eopd_again": "eopd submit c.yaml"}}
    lines = eopd("status", "j", "--address", URL).out.splitlines()
    told = "continue, in the folder that it was submitted from, with: eopd submit c.yaml"
    assert (told in lines) == is_told


def test_a_job_is_stopped_and_waited_for(client, eopd):
    client.states = [("RUNNING", None), ("RUNNING", None), ("STOPPED", None)]
    client.details["metadata"] = {"eopd_again": "eopd submit c.yaml"}
    done = eopd("stop", "j", "--address", URL)
    assert (done.code, client.stopped) == (0, ["j"])
    ended, advice = done.out.splitlines()[-2:]
    assert ended == "job j has ended: STOPPED"
    assert advice.endswith("submitted from, with: eopd submit c.yaml")


def test_jobs_that_cannot_be_stopped_softly_are_left_alone(client, eopd):
    done = eopd("stop", "j", "--address", URL)
    assert (done.code, "job j is SUCCEEDED: only a job" in done.err) == (2, True)
    client.states, client.details = [("RUNNING", None)], {"runtime_env": None}
    done = eopd("stop", "j", "--address", URL)
    assert (done.code, "was submitted without RAY_JOB_STOP_WAIT_TIME_S" in done.err) == (2, True)
    done = eopd("stop", "j", "--now", "--address", URL)
    assert (done.code, "--now: goes with a run directory" in done.err) == (2, True)
    assert client.stopped == []


@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_a_job_that_is_not_there_is_one_line(client, eopd, verb):
    client.get_job_logs = client.get_job_info
    done = eopd(verb, "nobody", "--address", URL)
    assert (done.code, done.err) == (2, f"error: {URL}: Job nobody does not exist\n")


# --- the job server


def test_the_address_is_the_option_or_a_variable(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://by-ray:1/")
    monkeypatch.delenv(jobs.API_ADDRESS, raising=False)
    assert server_address(None) == "http://by-ray:1"
    monkeypatch.setenv(jobs.API_ADDRESS, "https://by-api")
    assert server_address(None) == "https://by-api"
    assert server_address("http://option:2") == "http://option:2"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (None, "--address: is missing; name the job server of the cluster, such as http://HEAD:82"),
        ("head:8265", "--address: head:8265 is no job server; write its address as http://HEAD"),
        ("http://head:x", "--address: http://head:x is no job server"),
        ("ray://head:10001", "--address: ray://head:10001 is no job server"),
        (f"http://me:{SECRET}@head", "--address: takes no user and password, since the address"),
    ],
)
def test_addresses_of_another_kind_are_mistakes(monkeypatch, option, message):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv(jobs.API_ADDRESS, raising=False)
    with pytest.raises(ConfigError) as caught:
        server_address(option)

    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


@contextmanager
def serving(status, text):
    """A web server that gives every request the same answer; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (200, json.dumps({"ray_version": "2.9.0"}), "the cluster runs Ray 2.9.0, and this eopd ne"),
        (403, "Forbidden", "the cluster wants its token: set RAY_AUTH_MODE=token and RAY_AUT"),
        (401, "Unauthorized", "the cluster wants its token: set RAY_AUTH_MODE=token and RAY_"),
        (404, "", "is no job server of Ray 2.60.0 (it answers /api/version with status 404); its"),
        (200, "<html>", "is no job server of Ray 2.60.0 (it answers /api/version with status 200"),
    ],
)
def test_a_server_that_takes_no_jobs_is_one_line(monkeypatch, status, text, message):
    monkeypatch.setenv(jobs.API_ADDRESS, "http://another:1")
    with serving(status, text) as address, pytest.raises(ConfigError) as caught:
        connect(address)

    assert str(caught.value).startswith(f"{address}: {message}")
    assert "\n" not in str(caught.value)


def test_nobody_and_nothing_in_time_are_one_line(monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}: no job server answers within 0 s"):
            connect(address)

    with pytest.raises(ConfigError, match=f"{address}: no job server answers there .*refused"):
        connect(address)


def test_of_a_servers_traceback_the_last_line_is_told():
    client = FakeClient()
    said = (
        "Request failed with status code 500: Traceback (most recent call last):\n"
        '  File "job_head.py", line 1, in submit_job\n'
        "ValueError: Job with submission_id j already exists. Please use a different one.\n."
    )

    def refuse(name):
        raise RuntimeError(said)

    client.get_job_info = refuse
    with pytest.raises(ConfigError) as caught:
        Jobs(client, URL).look_up("j")

    assert str(caught.value) == (
        f"{URL}: Job with submission_id j already exists. Please use a different one"
    )
