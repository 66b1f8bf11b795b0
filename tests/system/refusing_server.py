"""A teacher's server that refuses every prompt of a run: what poisonous prompts meet again and again.

It answers as ``vllm serve`` does (``/v1/models``, ``/v1/completions`` with ``prompt_logprobs``) until
the run has tested it, and what a client asks when it starts also later. The token before chooses a
favourite, which is as likely as all others together.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

from eopd.teacher.selftest import CONTINUATION_TOKENS

MODEL = "refusing"
START_TOKENS = 2  # what a client asks for when it starts
SELF_TEST = CONTINUATION_TOKENS + 3  # requests of a run's self-test of one replica


@dataclass
class Refusing:
    """The server, and how often it was asked for more than a client asks when it starts."""

    url: str
    asked: int = 0


def teachers(server: Refusing, model: Path, *, replicas: int) -> str:
    """An override: a teacher with replicas for all prompts but those of source ``poison``,
    which the server teaches.
    """
    own = (
        f"{{name: teacher, model: {model}, dtype: float32, cpus: 0.25, vllm: "
        f"{{kv_cache_memory_bytes: 67108864}}, "
    )
    served = (
        f"{{name: served, model: {model}, dtype: float32, backend: openai, cpus: 0, sources: "
        "[poison], "
    )
    return (
        f"teachers=[{own}replicas: {replicas}}}, {served}server: {{url: '{server.url}', "
        f"model: {MODEL}}}}}]"
    )


def row(before: int, token: int, top_k: int, vocab_size: int) -> dict[str, dict[str, float]]:
    """Log-probabilities of the token and of the top k."""
    favourite, other = (7 * before + 3) % vocab_size, math.log(0.5 / (vocab_size - 1))
    top = [favourite, *(i for i in range(top_k) if i != favourite)][:top_k]
    return {str(i): {"logprob": math.log(0.5) if i == favourite else other} for i in {*top, token}}


@contextmanager
def refusing_server(*, vocab_size: int) -> Iterator[Refusing]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, {"data": [{"id": MODEL, "max_model_len": 1 << 20}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            refusing.asked += len(asked["prompt"]) > START_TOKENS
            if refusing.asked > SELF_TEST and len(asked["prompt"]) > START_TOKENS:
                self._answer(400, {"error": {"message": "this prompt is refused"}})
                return

            ids, top_k = asked["prompt"], asked["prompt_logprobs"]
            rows = [
                row(
                    before,
                    token,
                    top_k,
                    vocab_size,
                )
                for before, token in pairwise(ids)
            ]
            self._answer(200, {"choices": [{"prompt_logprobs": [None, *rows]}]})

        def _answer(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    refusing = Refusing(f"http://127.0.0.1:{server.server_address[1]}")
    Thread(target=server.serve_forever, daemon=True).start()

    try:
        yield refusing
    finally:
        server.shutdown()
