"""``eopd teacher serve`` as a process of its own, on real vLLM, against a float32 oracle made
with transformers.
"""

import asyncio
import json
import os
import re
import signal as signal_module
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from eopd.config import ConfigError, ServerConfig, TeacherConfig
from eopd.teacher.served import server
from eopd.teacher.served.eopd_scorer import EopdTeacherScorer
from eopd.teacher.served.wire import INFO_PATH, MEDIA_TYPE, SCORE_PATH, decode_answer, encode_answer
from eopd.teacher.signal import SignalError
from eopd.types import TeacherSignal

TOP_K, LONGEST, TEMPERATURE = 8, 96, 0.7
VARIABLE, TOKEN = "EOPD_TEST_TOKEN", "correct-horse"
START_S = 90.0

CONFIG = """
run: {{name: served, batches: 1}}
student: {{model: /nowhere}}
teachers:
  - {{name: other, model: /nowhere, sources: other}}
  - {{name: maths, model: {model}, dtype: float32, temperature: {temperature},
      vllm: {{kv_cache_memory_bytes: 67108864, max_num_seqs: 4}}}}
prompts: {{data: none, held_out: none, max_tokens: 32}}
rollout: {{max_response_tokens: 64}}
evaluation: {{max_response_tokens: 64}}
flow: {{batch_prompts: 1}}
loss: {{top_k: {top_k}}}
telemetry: {{discovery: {targets}}}
"""


class Served:
    """The process, its log, and a client."""

    def __init__(self, config: Path, log: Path) -> None:
        command = [
            sys.executable,
            "-c",
            "from eopd.cli.main import main; main()",
            "teacher",
            "serve",
            str(config),
        ]
        options = ["--teacher", "maths", "--port", "0", "--api-key-env", VARIABLE]
        self.config, self.log = config, log

        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=output,
                stderr=output,
                env=os.environ | {VARIABLE: TOKEN},
                start_new_session=True,
            )

        address = self.wait_for(lambda: re.search(r"served at (http://\S+:\d+)", log.read_text()))
        self.client = httpx.Client(
            base_url=address[1],
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30.0,
        )

    def wait_for(self, condition):
        end = time.monotonic() + START_S
        while not (found := condition()):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

        return found

    def wait_until_ready(self) -> None:
        self.wait_for(self._answers)

    def _answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def score(self, prompt_ids: list[int], response_ids: list[int]) -> httpx.Response:
        asked = {"prompt_ids": prompt_ids, "response_ids": response_ids}
        return self.client.post(SCORE_PATH, json=asked)

    def tokens_read(self) -> float:
        """Tokens of all requests that the engine has read, as its metrics have it."""
        metrics = self.client.get("/metrics").text
        return float(re.search(r"^vllm:prompt_tokens_total{.*} (\S+)$", metrics, re.M)[1])

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> list[psutil.Process]:
        """vLLM's processes: Python's name for them until they have given themselves one."""
        found = []
        for child in self.descendants():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                if re.search("spawn_main|VLLM::", " ".join(child.cmdline())):
                    found.append(child)

        return found

    def listens(self) -> bool:
        return any(
            c.status == psutil.CONN_LISTEN
            for c in psutil.Process(self.process.pid).net_connections("tcp")
        )

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3", seed=3, scale=0.2)


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "config.yaml"
    given = {"model": model, "temperature": TEMPERATURE, "top_k": TOP_K}
    path.write_text(CONFIG.format(**given, targets=path.parent / "targets"))
    return path


@pytest.fixture
def start(config, tmp_path):
    """Start it (a test does so once), and stop what a failing test left."""
    started = []

    def make() -> Served:
        started.append(Served(config, tmp_path / "log"))
        return started[-1]

    yield make
    for served in started:
        served.close()


def targets(served: Served) -> list[dict]:
    """What Prometheus is told of teachers."""
    files = (served.config.parent / "targets").glob("*.json")
    return [target for file in files for target in json.loads(file.read_text())]


def oracle(model: Path, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """Log-probabilities [R, V] from a float32 forward pass."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt_ids, *response_ids]])).logits[
            0, len(prompt_ids) - 1 : -1
        ]

    return torch.log_softmax(logits.double() / TEMPERATURE, -1).numpy()


def worst_error(signal, response_ids: list[int], logprobs: np.ndarray) -> float:
    ordered = -np.sort(-logprobs, axis=1)
    errors = (
        signal.entropy.entropy + (np.exp(logprobs) * logprobs).sum(1),
        signal.token_logprobs - logprobs[range(len(logprobs)), response_ids],
        signal.topk_logprobs - ordered[:, :TOP_K],
        np.take_along_axis(logprobs, signal.topk_ids, 1) - ordered[:, :TOP_K],
        signal.tail_logprobs - np.logaddexp.reduce(ordered[:, TOP_K:], axis=1),
    )
    return max(float(np.abs(error).max()) for error in errors)


def read(answer: httpx.Response, num_response_tokens: int) -> TeacherSignal:
    assert answer.status_code == 200, answer.text
    return decode_answer(
        answer.content, teacher="maths", num_response_tokens=num_response_tokens, top_k=TOP_K
    )


async def check_client(served, model, prompt_ids, response_ids, expected: bytes) -> None:
    """Through the role, as a run does; and what it does not agree on is the user's mistake."""
    server = {"url": str(served.client.base_url), "api_key_env": VARIABLE}
    config = TeacherConfig(
        name="m",
        backend="eopd",
        model=model,
        dtype="float32",
        temperature=TEMPERATURE,
        server=server,
    )
    scorer = await EopdTeacherScorer.start(
        config,
        top_k=TOP_K,
        max_sequence_tokens=LONGEST,
    )
    found = await scorer.signal(np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))
    assert found.teacher == "m" and encode_answer(found) == expected
    with pytest.raises(SignalError, match=r"^POST .*/v1/teacher/score: 422"):
        await scorer.signal(np.ones(LONGEST, np.int32), np.ones(1, np.int32))

    await scorer.close()

    for wrong, arguments, message in [
        ({}, {"top_k": TOP_K + 1}, f"has top_k {TOP_K}, this run needs {TOP_K + 1}"),
        ({"temperature": 1.0}, {}, f"has temperature {TEMPERATURE}, this run needs 1.0"),
        ({}, {"max_sequence_tokens": LONGEST + 1}, f"takes sequences of {LONGEST} tokens"),
        ({"server": ServerConfig(url=server["url"])}, {}, "lets nobody in: .*401"),
        (
            {"server": ServerConfig(url=server["url"] + "/no", api_key_env=VARIABLE)},
            {},
            "is no teacher's server",
        ),
    ]:
        with pytest.raises(ConfigError, match=rf"teachers\.m\.server: .*{message}"):
            await EopdTeacherScorer.start(
                config.model_copy(update=wrong),
                **{"top_k": TOP_K, "max_sequence_tokens": LONGEST} | arguments,
            )


async def hang_up(served, request) -> None:
    """Ask, and close the connection before there is an answer."""
    async with httpx.AsyncClient(headers=served.client.headers) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(
                served.client.base_url.join(SCORE_PATH),
                json=request,
                timeout=1.0,
            )


def test_scores_are_exact_and_a_stop_finishes_what_is_in_flight(start, model, monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)
    served = start()
    served.wait_until_ready()
    (target,) = targets(served)
    assert target["targets"] == [f"{served.client.base_url.host}:{served.client.base_url.port}"]
    assert target["labels"]["teacher"] == "maths" and target["labels"]["__scheme__"] == "http"
    info = served.client.get(INFO_PATH).json()
    vocab = info["vocab_size"]
    assert info == {
        "name": "maths",
        "top_k": TOP_K,
        "vocab_size": AutoModelForCausalLM.from_pretrained(model).config.vocab_size,
        "temperature": TEMPERATURE,
        "max_sequence_tokens": LONGEST,
        "wire_version": 2,
    }
    rng = np.random.default_rng(7)

    for num_prompt, num_response in [(1, 1), (30, 40), (32, 64)]:
        prompt_ids = rng.integers(vocab, size=num_prompt).tolist()
        response_ids = rng.integers(vocab, size=num_response).tolist()
        answer = served.score(prompt_ids, response_ids)
        signal = read(answer, num_response)
        assert (
            worst_error(
                signal,
                response_ids,
                oracle(model, prompt_ids, response_ids),
            )
            < 5e-5
        )
        assert answer.headers["content-type"] == MEDIA_TYPE

    bits = encode_answer(signal)
    asyncio.run(check_client(served, model, prompt_ids, response_ids, bits))

    assert served.score([1] * 33, [1] * 64).status_code == 422
    assert served.score([1], [vocab]).status_code == 422
    assert served.score([], [1]).status_code == 400
    for path in (INFO_PATH, SCORE_PATH, "/v1/models"):
        assert httpx.get(served.client.base_url.join(path)).status_code == 401

    described = served.client.get("/openapi.json").json()["paths"]
    assert set(described) == {"/health", "/metrics", "/version", INFO_PATH, SCORE_PATH}
    for path in ("/pooling", "/tokenize", "/invocations", "/ping"):  # without the token
        assert httpx.post(served.client.base_url.join(path), json={}).status_code == 404
        assert httpx.get(served.client.base_url.join(path)).status_code == 404

    request = {"prompt_ids": [5] * 32, "response_ids": [6] * 64}
    descendants, engines = served.descendants(), served.engines()
    assert engines
    before = served.tokens_read()
    for engine in engines:
        engine.suspend()

    asyncio.run(hang_up(served, request))
    for engine in engines:
        engine.resume()

    assert served.score([5], [6]).status_code == 200
    served.wait_for(lambda: served.tokens_read() > before)
    assert served.tokens_read() == before + 2, "nothing of what the client gave up"

    for engine in engines:
        engine.suspend()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.score, *request.values()) for _ in range(8)]
        time.sleep(1.0)  # they arrive; no metric moves while the engine is suspended
        served.process.send_signal(signal_module.SIGTERM)
        for engine in engines:
            engine.resume()

        outcomes = [(answer.result().status_code, answer.result().text[:200]) for answer in answers]
        assert {code for code, _ in outcomes} == {200}, outcomes

    assert served.process.wait(30) == 0
    assert targets(served) == []
    assert psutil.wait_procs(descendants, timeout=5)[1] == []


@pytest.mark.parametrize(
    "options",
    [
        ["--api-key", "other"],
        ["--api-key", ""],
        ["--root-path", "/v1/t"],
        ["--api-server-count", "2"],
        ["--max-model-len", "7"],
        ["--port", "9"],
        ["learner.lr=1"],
    ],
)
def test_options_that_are_not_for_this_server_are_refused(options):
    with pytest.raises(ConfigError, match=r"behind --: is not for the server of a teacher"):
        server._arguments({}, options)


@pytest.mark.slow
def test_a_stop_while_the_engine_starts_leaves_nothing(start):
    served = start()
    served.wait_for(served.engines)
    descendants = served.descendants()
    # as a terminal does on Ctrl-C: to vLLM's processes too
    os.killpg(served.process.pid, signal_module.SIGINT)
    assert served.process.wait(15) == 0
    assert targets(served) == []
    assert psutil.wait_procs(descendants, timeout=5)[1] == []


@pytest.mark.slow
def test_the_process_ends_with_an_error_when_its_engine_dies(start):
    served = start()
    served.wait_until_ready()
    assert served.score([5], [6]).status_code == 200
    engines = served.engines()
    assert engines
    for engine in engines:
        engine.kill()

    with pytest.raises(httpx.TransportError):
        while True:
            assert served.score([5], [6]).status_code in (500, 503)

    assert served.process.wait(30) == 1
    assert "error: teacher maths: its engine died" in served.log.read_text()
    assert targets(served), "Prometheus misses it"
