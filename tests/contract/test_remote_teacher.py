"""A teacher behind a real, unmodified vLLM server, against a full-vocabulary oracle made with
transformers.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import teacher_oracle
import torch
from teacher_oracle import trajectory
from transformers import AutoModelForCausalLM

from eopd.config import ConfigError, ServerConfig, TeacherConfig
from eopd.roles import TeacherDownError
from eopd.teacher.served import http
from eopd.teacher.served.openai_scorer import OpenAITeacherScorer
from eopd.tokenizer import vocab_size
from eopd.types import LostReason, LostTrajectory, Stored, Trajectory

MAX_TOKENS = 160
KEY = "sk-teacher"

pytestmark = pytest.mark.slow
LENGTHS = [(1, 1), (3, 40), (70, 2), (1, 90), (40, 119), (17, 23)]  # prompt, response


class Server:
    """``vllm serve`` of one tiny model, which allows all but one token of the vocabulary as
    candidates.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

        options = {
            "--model": model,
            "--served-model-name": "tiny",
            "--dtype": "float32",
            "--max-model-len": MAX_TOKENS,
            "--max-logprobs": vocab_size(model) - 1,
            "--host": "127.0.0.1",
            "--port": self.port,
        }
        flags = ["--enforce-eager", "--skip-tokenizer-init"]
        pairs = [str(word) for pair in options.items() for word in pair]
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags]
        self._env = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_API_KEY": KEY,
            "VLLM_PLUGINS": "",
        }

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=log, start_new_session=True
            )

        for _ in range(1200):
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                return httpx.get(
                    f"http://127.0.0.1:{self.port}/health", timeout=5.0
                ).raise_for_status()
            except httpx.TransportError:
                time.sleep(0.1)

        raise TimeoutError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        """At once, with the engine's processes."""
        with suppress(ProcessLookupError):  # it died by itself
            os.killpg(self._process.pid, signal.SIGKILL)

        self._process.wait()


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("qwen3", seed=3, scale=0.2)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("server") / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def scoring(server, model, monkeypatch):
    """Open a scorer: ``async with scoring(top_k=16, port=...) as scorer``."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr(http, "_LONGEST_PAUSE_S", 1.0)

    @asynccontextmanager
    async def opened(
        *, top_k: int, port: int = server.port, model_name: str = "tiny", **options: object
    ):
        where = {
            "url": f"http://127.0.0.1:{port}",
            "model": model_name,
            "api_key_env": "TEACHER_KEY",
        }
        config = TeacherConfig(
            backend="openai", model=model, dtype="float32", server=ServerConfig(**where | options)
        )
        scorer = await OpenAITeacherScorer.start(
            config, top_k=top_k, max_sequence_tokens=MAX_TOKENS - 1
        )

        try:
            yield scorer
        finally:
            await scorer.close()

    return opened


@pytest.fixture(scope="module")
def batch(model) -> list[Stored[Trajectory]]:
    rng, size = np.random.default_rng(7), vocab_size(model)
    draw = [[rng.integers(size, size=n).tolist() for n in lengths] for lengths in LENGTHS]
    return [trajectory(prompt, response) for prompt, response in draw]


@pytest.fixture(scope="module")
def oracle(model, batch) -> list[np.ndarray]:
    """Log-probabilities float64 [R, V] of every token at every response position, of every
    trajectory.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).double()

    return [teacher_oracle.oracle(network, stored.body, 1.0) for stored in batch]


@pytest.mark.parametrize("less_than_all", [False, True])
async def test_the_signal_equals_the_oracle_and_its_bounds_hold_the_entropy(
    scoring, model, batch, oracle, less_than_all
):
    top_k = vocab_size(model) - 1 if less_than_all else 16
    async with scoring(top_k=top_k) as scorer:
        results = await asyncio.gather(*(scorer.score(stored) for stored in batch))

    outside = 0

    for stored, result, logprobs in zip(batch, results, oracle, strict=True):
        assert isinstance(result, Stored), result
        said, rows, tokens = result.body.signal, np.arange(len(logprobs)), stored.body.response_ids
        ordered = -np.sort(-logprobs, axis=1)
        np.testing.assert_allclose(
            said.token_logprobs,
            logprobs[rows, tokens],
            rtol=0,
            atol=5e-5,
        )
        np.testing.assert_allclose(
            said.topk_logprobs,
            ordered[:, :top_k],
            rtol=0,
            atol=5e-5,
        )
        np.testing.assert_allclose(
            logprobs[rows[:, None], said.topk_ids], ordered[:, :top_k], rtol=0, atol=5e-5
        )
        mass = np.exp(ordered[:, top_k:]).sum(1)
        np.testing.assert_allclose(np.exp(said.tail_logprobs), mass, rtol=0, atol=1e-5)
        # the two models' own difference
        entropy, slack = -(np.exp(logprobs) * logprobs).sum(1), 1e-5
        assert (said.entropy.low <= entropy + slack).all()
        assert (said.entropy.high >= entropy - slack).all()
        assert (said.entropy.high - said.entropy.low).max() < (1e-4 if less_than_all else 3.0)
        outside += (said.topk_ids != tokens[:, None]).all(1).sum()

    assert (outside > 50) != less_than_all


async def test_the_header_gains_sums_over_response_tokens(scoring, batch):
    async with scoring(top_k=4) as scorer:
        result = await scorer.score(batch[1])

    said, sums = result.body.signal, dict(result.header.sums)
    assert result.body.trajectory is batch[1].body
    assert sums.pop("score_s") > 0.0
    middles = (said.entropy.low.astype(float) + said.entropy.high) / 2
    expected = {
        "generate_s": 1.5,
        "teacher_logprob": said.token_logprobs.sum(),
        "teacher_entropy": middles.sum(),
    }
    assert sums == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ([5] * (MAX_TOKENS - 1), "400 Bad Request: max_tokens must be at least 1"),
        ([5] * MAX_TOKENS, "400 Bad Request: "),
        ([5, 1 << 20], "outside its vocabulary"),
    ],
    ids=["no room for the token that is always written", "too long", "unknown token"],
)
async def test_a_request_that_fails_is_a_value_and_the_server_lives_on(
    scoring, batch, response, detail
):
    bad = trajectory([5], response)
    async with scoring(top_k=4) as scorer:
        lost, scored = await asyncio.gather(scorer.score(bad), scorer.score(batch[0]))

    assert isinstance(lost, LostTrajectory)
    assert (lost.key, lost.reason) == (bad.header.key, LostReason.TEACHER_FAILED)
    assert detail in lost.detail
    assert isinstance(scored, Stored)


async def test_what_the_server_cannot_do_is_a_mistake_of_the_config_quoting_it(
    scoring, model, monkeypatch
):
    size = vocab_size(model)
    with pytest.raises(ConfigError, match=r"server\.model: large is not served there; tiny is"):
        await scoring(top_k=4, model_name="large").__aenter__()

    with pytest.raises(
        ConfigError, match=f"top_k {size}: .*400.* greater than max allowed: {size - 1}"
    ):
        await scoring(top_k=size).__aenter__()

    monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
    with pytest.raises(ConfigError, match="401 Unauthorized"):
        await scoring(top_k=4).__aenter__()

    with pytest.raises(TeacherDownError, match="1 attempts failed, the last one with ConnectError"):
        await scoring(top_k=4, port=1, max_attempts=1).__aenter__()


FAULTS = [
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0.05\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 5\r\nConnection: close\r\n\r\nfault",
    b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\nConnection: close\r\n\r\n{",  # cut off
]


@asynccontextmanager
async def faulty_proxy(port: int):
    """The port of a proxy that serves one request per connection, and only every fourth
    connection well.
    """
    faults: list[bytes] = []
    connections = iter(range(1 << 20))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        number = next(connections) % 4
        if number < len(FAULTS):
            faults.append(FAULTS[number])
            writer.write(FAULTS[number])
        else:
            back, forth = await asyncio.open_connection("127.0.0.1", port)
            length = [
                line for line in head.splitlines() if line.lower().startswith(b"content-length")
            ]
            body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
            forth.write(head.replace(b"keep-alive", b"close") + body)
            writer.write(await back.read())
            forth.close()

        await writer.drain()
        writer.close()

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield proxy.sockets[0].getsockname()[1], faults
    proxy.close()


async def test_answers_that_may_be_better_later_lose_nothing(server, scoring, batch):
    async with (
        faulty_proxy(server.port) as (port, faults),
        scoring(top_k=4, port=port, max_attempts=40, max_connections=2) as scorer,
    ):
        results = await asyncio.gather(*(scorer.score(stored) for stored in batch))

    assert all(isinstance(result, Stored) for result in results)
    assert set(faults) == set(FAULTS)


async def test_a_server_killed_and_started_again_loses_nothing(server, scoring, batch):
    async with scoring(top_k=4, max_attempts=1000, max_connections=2) as scorer:
        before = [await scorer.score(stored) for stored in batch]
        tasks = [asyncio.create_task(scorer.score(stored)) for stored in batch * 20]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        server.kill()
        in_flight = sum(not task.done() for task in tasks)
        await asyncio.to_thread(server.start)
        results = await asyncio.gather(*tasks)

    assert in_flight > len(batch)
    assert all(isinstance(result, Stored) for result in results)

    for result, expected in zip(results, before * 20, strict=True):
        np.testing.assert_allclose(
            result.body.signal.token_logprobs,
            expected.body.signal.token_logprobs,
            rtol=0,
            atol=1e-4,
        )
