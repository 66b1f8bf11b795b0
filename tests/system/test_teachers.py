"""Teachers in whole runs: engines and servers that die, servers that know bounds only, other ends and other prompts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.telemetry.rows import series

ROOT = Path(__file__).parents[2]


def rows(directory):
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def arguments(program, tmp_path_factory):
    data = tmp_path_factory.mktemp("prompts") / "mixed.jsonl"
    lines = (ROOT / "configs/prompts/demo_train.jsonl").read_text().splitlines()
    mixed = [json.loads(line) | {"source": ("math", "code", "prose")[i % 3]} for i, line in enumerate(lines[:96])]
    data.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    engine = "model: MODEL, dtype: float32, cpus: 0.2, vllm: {kv_cache_memory_bytes: 67108864}"
    engine = engine.replace("MODEL", str(program.models / "teacher"))
    teachers = f"[{{name: exact-1, sources: [math, code], replicas: 2, {engine}}}, {{name: other, {engine}}}]"
    return program.train(
        "teachers",
        f"teachers={teachers}",
        f"prompts.data={data}",
        f"prompts.held_out={data}",
        "run.batches=3000",
        "rollout.engines=1",
        "learner.ranks=1",
        "evaluation.prompts=8",
    )


def engines_of_teachers(program):
    """Engine processes of the teachers' actors."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().startswith("ray::Teacher") and program.mark in process.environ():
                found += [child for child in process.children(recursive=True) if "EngineCore" in child.name()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for(process, directory, ready):
    """The rows, once they are ``ready``."""
    deadline = time.monotonic() + 300
    while not ((found := rows(directory)) and ready(found)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    return found


def of_teacher(row, name, teacher):
    return row[series(f"eopd_teacher_{name}", teacher=teacher)]


def test_an_engine_that_dies_is_replaced_while_the_run_goes_on(program, arguments):
    directory = program.runs / "teachers"
    process = program.start(*arguments)
    wait_for(process, directory, lambda found: len(found) >= 3)
    engines = engines_of_teachers(program)
    assert len(engines) == 3
    os.kill(engines[0].pid, signal.SIGKILL)
    replaced = wait_for(
        process,
        directory,
        lambda found: sum(of_teacher(found[-1], "replacements_total", name) for name in ("exact-1", "other")) == 1,
    )
    wait_for(process, directory, lambda found: len(found) >= len(replaced) + 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert program.left_behind() == []
    found, last = rows(directory), rows(directory)[-1]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert sum(value for name, value in last.items() if name.startswith("eopd_lost_trajectories_total")) == 0
    assert of_teacher(last, "replicas_up", "exact-1") == 2 and of_teacher(last, "replicas_up", "other") == 1
    tokens = [of_teacher(last, "tokens_total", name) for name in ("exact-1", "other")]
    assert sum(tokens) > last["eopd_response_tokens_total"]  # and the held-out ones
    assert 1.2 < tokens[0] / tokens[1] < 3.5  # two sources of three


def eopd_server(program, port: int) -> list[str]:
    """The command of our own server."""
    settings = [f"teachers.0.model={program.models / 'teacher'}", f"student.model={program.models / 'student'}"]
    command = [str(Path(sys.executable).with_name("eopd")), "teacher", "serve", "configs/tiny.yaml"]
    return [*command, "--port", str(port), *(part for setting in settings for part in ("--set", setting))]


def stock_server(program, port: int) -> list[str]:
    """The command of an unmodified vLLM server."""
    options = {
        "model": program.models / "teacher",
        "served-model-name": "tiny",
        "dtype": "float32",
        "max-model-len": 256,
        "host": "127.0.0.1",
        "port": port,
        "kv-cache-memory-bytes": 67108864,
    }
    pairs = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, "--enforce-eager"]


class Server:
    """A teacher's server on a port of its own, which can be killed with all its processes and started again."""

    def __init__(self, program, command, ready: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._ready = f"http://127.0.0.1:{self.port}{ready}"
        self._program = program
        self._command = command(program, self.port)
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._program.environment(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(self._ready).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
            process.kill()
        self._process.wait()


@pytest.mark.parametrize(
    ("backend", "command", "ready", "name"),
    [("eopd", eopd_server, "/ready", "null"), ("openai", stock_server, "/health", "tiny")],
)
def test_a_run_outlives_its_teacher_s_server(program, tmp_path, backend, command, ready, name):
    directory = program.runs / backend
    server = Server(program, command, ready, tmp_path / "log")
    try:
        where = f"url: 'http://127.0.0.1:{server.port}', model: {name}, max_attempts: 2"
        process = program.start(
            *program.train(
                backend,
                f"teachers.0.backend={backend}",
                "teachers.0.vllm={}",
                f"teachers.0.server={{{where}}}",
                "run.batches=3000",
                "rollout.engines=1",
                "learner.ranks=1",
                "evaluation.prompts=8",
            )
        )
        before = wait_for(process, directory, lambda found: len(found) >= 3)
        server.kill()
        time.sleep(5.0)  # longer than its two attempts
        server.start()
        wait_for(process, directory, lambda found: len(found) >= len(before) + 10)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        server.kill()
    assert process.returncode == 130, out + err
    assert program.left_behind() == []
    found = rows(directory)
    uncertain = [row["eopd_gate_uncertain_ratio"] for row in found]
    assert max(uncertain) < 0.5 and (max(uncertain) > 0.0) == (backend == "openai")  # bounds, or the exact entropy
    assert of_teacher(found[-1], "failures_total", "teacher") > 0
    assert sum(value for name, value in found[-1].items() if name.startswith("eopd_lost_trajectories_total")) == 0


@pytest.fixture(scope="module")
def base_student(program, tmp_path_factory) -> Path:
    """The tiny student as a base model: its responses end with <|endoftext|>, those of its teacher with <|im_end|>."""
    directory = tmp_path_factory.mktemp("base") / "student"
    shutil.copytree(program.models / "student", directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(directory)
    pair = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[pair] = weight[pair[::-1]]
    model.config.eos_token_id = model.generation_config.eos_token_id = pair[0]
    model.save_pretrained(directory)
    return directory


def test_a_base_student_learns_to_end_like_a_chat_teacher_that_reads_another_prompt(program, base_student):
    tokenizer = AutoTokenizer.from_pretrained(base_student)
    end, chat_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    arguments = program.train(
        "base",
        f"student.model={base_student}",
        "teachers.0.template='Between us, the answer is known. {{ prompt }}'",
        "teachers.0.max_prompt_tokens=192",
        "loss.reverse_kl={kind: topk_tail}",  # reads the candidates, whose end tokens are mapped back
        "rollout.engines=1",
        "learner.ranks=1",
    )
    refused = program.run(*arguments)
    assert refused.returncode == 2
    remap = f"eos_remap: {{{end}: {chat_end}}}"
    assert f"write {remap}" in refused.stderr and "Traceback" not in refused.stderr
    done = program.run(*arguments, "--set", f"teachers.0.{remap.replace(': {', '={')}")
    assert done.returncode == 0, done.stderr
    directory = program.runs / "base"
    held_out = json.loads((directory / "summary.json").read_text())["held_out"]
    assert held_out["after"]["reverse_kl"]["mean"] < 0.5 * held_out["before"]["reverse_kl"]["mean"]
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    sentence = tokenizer(f"{question}I like to sing by the lake every night.", return_tensors="pt").input_ids
    ends = []
    for model in (base_student, directory / "hf"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(sentence).logits[0, -1]
        ends.append(logits.softmax(-1)[[end, chat_end]].tolist())
    assert ends[0][0] < 0.7 and ends[1][0] > 0.9 and ends[1][1] < 0.01, ends
