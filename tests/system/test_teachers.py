"""Teachers in whole runs: two servers that die, one of which knows bounds only; other ends
and other prompts.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from program import ROOT, Run, lost
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.runtime.placement import EAGER
from eopd.telemetry.series import series


def eopd_server(program, port: int) -> list[str]:
    """The command of our own server."""
    settings = [
        f"teachers.0.model={program.models / 'teacher'}",
        f"student.model={program.models / 'student'}",
    ]
    command = [str(Path(sys.executable).with_name("eopd")), "teacher", "serve", "configs/tiny.yaml"]
    return [
        *command,
        "--port",
        str(port),
        *(part for setting in settings for part in ("--set", setting)),
    ]


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
    """A teacher's server on a port of its own, which can be killed with all its processes and
    started again.
    """

    def __init__(self, program, command, ready: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

        self._ready = f"http://127.0.0.1:{self.port}{ready}"
        self._program = program
        self._command = command(program, self.port)
        self._log = log
        self._process = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._program.environment() | EAGER,
                stdout=log,
                stderr=log,
            )

        deadline = time.monotonic() + 300

        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (
                self._log.read_text()[-3000:]
            )
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(self._ready).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return

        for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
            process.kill()

        self._process.wait()


@pytest.fixture(scope="module")
def servers(program, tmp_path_factory):
    """Our own server and a stock one, both up."""
    logs = tmp_path_factory.mktemp("servers")
    servers = [
        Server(program, eopd_server, "/health", logs / "eopd"),
        Server(program, stock_server, "/health", logs / "stock"),
    ]

    try:
        start(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()


def start(servers: list[Server]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(Server.start, servers))


@pytest.fixture(scope="module")
def run(program, servers, tmp_path_factory):
    """Two sources of three are our server's, the third one the stock server's."""
    data = tmp_path_factory.mktemp("prompts") / "mixed.jsonl"
    lines = (ROOT / "configs/prompts/demo_train.jsonl").read_text().splitlines()
    mixed = [
        json.loads(line) | {"source": ("math", "code", "prose")[i % 3]}
        for i, line in enumerate(lines[:96])
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    ours, stock = (f"url: 'http://127.0.0.1:{server.port}', max_attempts: 2" for server in servers)
    model = f"model: {program.models / 'teacher'}, dtype: float32, cpus: 0.2"
    teachers = (
        f"[{{name: ours, backend: eopd, sources: [math, code], {model}, server: {{{ours}}}}},"
        f" {{name: stock, backend: openai, {model}, server: {{{stock}, model: tiny}}}}]"
    )
    run = Run(
        program,
        "served",
        f"teachers={teachers}",
        f"prompts.data={data}",
        f"prompts.held_out={data}",
        "run.batches=3000",
        # Of every source there is one in a batch, and who waits for one server has rows for the other.
        "flow={batch_prompts: 16, max_staleness: 2}",
        "cluster.max_restarts=100",  # a client is started anew while its server is away
        "checkpoint.every=1000",
        "rollout.engines=1",
        "learner.ranks=1",
        "evaluation.prompts=8",
    )
    yield run
    run.close()


def of_teachers(row: dict[str, float], name: str) -> list[float]:
    return [row[series(f"eopd_teacher_{name}", teacher=teacher)] for teacher in ("ours", "stock")]


@pytest.mark.slow
def test_a_run_outlives_its_teachers_servers(run, servers):
    before = run.wait(lambda row: row["step"] >= 3)
    for server in servers:
        server.kill()

    start(servers)  # which takes longer than the two attempts of their clients
    last = run.wait(lambda row: row["step"] >= before["step"] + 10)
    assert min(of_teachers(last, "failures_total")) > 0
    assert lost(last) == 0


@pytest.mark.slow
def test_each_source_goes_to_its_teacher(run):
    found = run.rows()
    tokens = of_teachers(found[-1], "tokens_total")
    assert sum(tokens) > found[-1]["eopd_response_tokens_total"]  # and the held-out ones
    assert 1.2 < tokens[0] / tokens[1] < 3.5  # two sources of three
    uncertain = [row["eopd_gate_uncertain_ratio"] for row in found]
    assert 0.0 < max(uncertain) < 0.5


@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_checkpoint_and_a_report(run, servers):
    before = len(run.log.read_text())
    said = run.interrupt()[before:]
    for server in servers:
        server.kill()

    assert run.program.left_behind() == []
    assert "Traceback" not in said
    stopped, found = run.summary(), run.rows()
    assert stopped["status"] == "interrupted"
    assert stopped["steps"] == len(found)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert ">interrupted</span>" in (run.directory / "report.html").read_text()
    assert [p.name for p in (run.directory / "checkpoints").iterdir()] == [
        f"step-{stopped['steps']:06d}"
    ]


@pytest.fixture(scope="module")
def base_student(program, tmp_path_factory) -> Path:
    """The tiny student as a base model: its responses end with <|endoftext|>, those of its
    teacher with <|im_end|>.
    """
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


@pytest.mark.slow
def test_a_base_student_learns_to_end_like_a_chat_teacher(program, base_student):
    tokenizer = AutoTokenizer.from_pretrained(base_student)
    end = tokenizer.eos_token_id
    chat_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    arguments = program.train(
        "base",
        f"student.model={base_student}",
        "teachers.0.template='Between us, the answer is known. {{ prompt }}'",
        "teachers.0.max_prompt_tokens=192",
        # reads the candidates, whose end tokens are mapped back
        "loss.reverse_kl={kind: topk_tail}",
        "rollout.engines=1",
        "learner.ranks=1",
    )
    refused = program.run(*arguments)
    assert refused.returncode == 2
    remap = f"eos_remap: {{{end}: {chat_end}}}"
    assert f"write {remap}" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = program.run(*arguments, "--set", f"teachers.0.{remap.replace(': {', '={')}")
    assert done.returncode == 0, done.stderr
    directory = program.runs / "base"
    held_out = json.loads((directory / "summary.json").read_text())["held_out"]
    assert held_out["after"]["reverse_kl"]["mean"] < 0.5 * held_out["before"]["reverse_kl"]["mean"]
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    sentence = tokenizer(
        f"{question}I like to sing by the lake every night.", return_tensors="pt"
    ).input_ids
    ends = []

    for model in (base_student, directory / "hf"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(
                sentence
            ).logits[0, -1]

        ends.append(logits.softmax(-1)[[end, chat_end]].tolist())

    # The tiny student, made from the shipped prompts, begins at 0.70; without mapped candidates it
    # falls.
    assert ends[1][0] > ends[0][0] + 0.2 and ends[1][0] > 0.9 and ends[1][1] < 0.01, ends
