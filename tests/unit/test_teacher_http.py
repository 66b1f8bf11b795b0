"""The client of a teacher's server: what it repeats, what it does not, how long it waits, and
that its key stays in.
"""

import asyncio
import pickle
import socket
import traceback
from collections.abc import Callable

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from eopd.config import ConfigError, ServerConfig
from eopd.roles import TeacherDownError
from eopd.teacher.served import http
from eopd.teacher.served.http import (
    ServerClient,
    explain,
    proxy_for,
)
from eopd.teacher.signal import SignalError

URL = "http://teacher.test:8000/prefix"
Answers = Callable[..., tuple[ServerClient, list[httpx.Request]]]


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """No waiting; what would have been waited."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(http.asyncio, "sleep", sleep)
    return asked


@pytest.fixture
def answering() -> Answers:
    """A client whose server gives these answers one after another; an exception is a broken
    connection.
    """

    def make(*answers: httpx.Response | Exception, **config):
        left, requests = list(answers), []

        def answer(request: httpx.Request) -> httpx.Response:
            requests.append(request)
            now = left.pop(0)
            if isinstance(now, Exception):
                raise now

            return now

        client = ServerClient(
            ServerConfig(url=URL, **config), transport=httpx.MockTransport(answer)
        )

        return client, requests

    return make


LATER = [
    *(httpx.Response(status) for status in (429, 500, 502, 503, 504)),
    httpx.ConnectError("refused"),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("disconnected"),
    httpx.ReadTimeout("late"),
]


@pytest.mark.parametrize("fault", LATER, ids=str)
async def test_what_may_be_better_later_is_tried_again(answering, pauses, fault):
    client, requests = answering(fault, httpx.Response(200, json={"a": 1}))
    answer = await client.post(
        "/v1/score", content=b"\0body", headers={"Content-Type": "application/x"}
    )
    assert answer.json() == {"a": 1}
    assert len(pauses) == 1
    assert [str(request.url) for request in requests] == [URL + "/v1/score"] * 2
    assert {request.content for request in requests} == {b"\0body"}
    assert {request.headers["Content-Type"] for request in requests} == {"application/x"}


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 413, 422, 501])
async def test_any_other_status_is_final(answering, pauses, status):
    client, requests = answering(httpx.Response(status))
    with pytest.raises(SignalError, match=f"POST {URL}/v1/score: {status} "):
        await client.post("/v1/score", json=[1])

    assert (len(requests), pauses) == (1, [])


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        ('{"error": {"message": "too\\n  long"}}', "too long"),
        ('{"detail": "no such path"}', "no such path"),
        ('{"message": "busy"}', "busy"),
        ('{"detail": [1]}', '{"detail": [1]}'),
        ("<html>\nBad</html>", "<html> Bad</html>"),
        ("x" * 5000, "x" * 300),
    ],
)
async def test_a_refusal_quotes_the_server_in_one_short_line(answering, body, quoted):
    client, _ = answering(httpx.Response(400, text=body))
    with pytest.raises(SignalError) as caught:
        await client.get("/v1/models")

    assert str(caught.value) == f"GET {URL}/v1/models: 400 Bad Request: {quoted}"


async def test_after_the_last_attempt_the_last_cause_is_told(answering, pauses):
    client, requests = answering(
        httpx.ConnectError("refused"),
        httpx.Response(500),
        httpx.Response(503, text="starting"),
        max_attempts=3,
    )
    with pytest.raises(TeacherDownError) as caught:
        await client.get("/v1/models")

    assert str(caught.value) == (
        f"GET {URL}/v1/models: 3 attempts failed, the last one with 503 Service Unavailable: "
        "starting"
    )
    assert (len(requests), len(pauses)) == (3, 2)
    assert caught.value.__context__ is None


async def test_pauses_grow_with_full_jitter_up_to_a_limit(answering, pauses, monkeypatch):
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(
        http.random, "uniform", lambda low, high: drawn.append((low, high)) or high / 4
    )
    client, _ = answering(*[httpx.Response(503)] * 8, max_attempts=8)
    with pytest.raises(TeacherDownError):
        await client.get("/v1/models")

    assert drawn == [(0.0, most) for most in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)]
    assert pauses == [high / 4 for _, high in drawn]


@pytest.mark.parametrize(
    ("header", "least"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("86400", 30.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        ("-3", 0.0),
        ("nan", 0.0),
    ],
)
async def test_retry_after_in_seconds_is_waited_at_least_and_at_most_half_a_minute(
    answering, pauses, header, least
):
    client, _ = answering(httpx.Response(429, headers={"Retry-After": header}), httpx.Response(200))
    await client.get("/v1/models")
    assert least <= pauses[0] <= least + 1.0


async def test_the_key_is_sent_and_never_shown(answering, pauses, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", " sk-secret-123\n")
    client, requests = answering(
        httpx.Response(401, json={"error": {"message": "wrong key sk-secret-123"}}),
        httpx.ConnectError("refused"),
        api_key_env="TEACHER_KEY",
        max_attempts=1,
    )
    shown = [repr(client), repr(client._client), repr(client._client.headers)]

    for expected in (SignalError, TeacherDownError):
        with pytest.raises(expected) as caught:
            await client.post("/v1/score", json={})

        shown += [
            *traceback.format_exception(caught.value),
            repr(caught.value),
            str(pickle.dumps(caught.value)),
        ]

    assert {request.headers["Authorization"] for request in requests} == {"Bearer sk-secret-123"}
    assert "wrong key ***" in "".join(shown)
    assert "secret" not in "".join(shown) + caplog.text


async def test_no_key_sends_no_authorization(answering):
    client, requests = answering(httpx.Response(200))
    await client.get("/v1/models")
    assert "Authorization" not in requests[0].headers


@pytest.mark.parametrize(
    ("value", "says"),
    [(None, "not set"), ("  ", "not set"), ("sk-\u00e9", "characters"), ("sk-a\nb", "characters")],
)
def test_a_missing_or_broken_key_is_a_mistake_of_the_config(monkeypatch, value, says):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)

    with pytest.raises(ConfigError, match=f"api_key_env.*TEACHER_KEY .*{says}") as caught:
        ServerClient(ServerConfig(url=URL, api_key_env="TEACHER_KEY"))

    assert "sk-" not in "".join(traceback.format_exception(caught.value))


class Server:
    """A real socket that answers after ``delay_s``, except that ``hang`` first connections
    are never answered.
    """

    def __init__(self, *, delay_s: float = 0.0, hang: int = 0, drop: int = 0) -> None:
        self.delay_s, self.hang, self.drop = delay_s, hang, drop
        self.connections = self.busy = self.most_busy = self.requests = 0

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.connections <= self.hang:
            await reader.read()  # until the client gives up
        elif self.connections > self.drop:
            await self._answer(reader, writer)

        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not reader.at_eof():
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return

            self.requests += 1
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            await asyncio.sleep(self.delay_s)
            self.busy -= 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def hurried(monkeypatch) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.01)


async def test_connections_are_bounded_and_used_again_and_waiting_for_one_is_not_late(hurried):
    async with Server(delay_s=0.05) as server:  # 2.5 s for all
        client = ServerClient(
            ServerConfig(url=server.url, max_connections=3, timeout_s=2.0, max_attempts=1)
        )
        answers = await asyncio.gather(*(client.get("/") for _ in range(150)))
        await client.close()

    assert [answer.text for answer in answers] == ["ok"] * 150
    assert (server.most_busy, server.connections, server.requests) == (3, 3, 150)


async def test_a_deadline_missed_is_tried_again_on_a_new_connection(hurried):
    async with Server(hang=2) as server:
        client = ServerClient(
            ServerConfig(url=server.url, max_connections=1, timeout_s=0.1, max_attempts=3)
        )
        assert (await client.get("/")).text == "ok"
        await client.close()

    assert server.connections == 3


async def test_a_server_that_never_answers_is_unavailable(hurried):
    async with Server(hang=9) as server:
        client = ServerClient(
            ServerConfig(
                url=server.url,
                timeout_s=0.05,
                max_attempts=2,
            )
        )
        with pytest.raises(TeacherDownError, match=r"2 attempts .* no answer within 0.05 s"):
            await client.get("/")

        await client.close()


async def test_a_dropped_connection_and_a_closed_port_are_tried_again(hurried):
    async with Server(drop=2) as server:
        client = ServerClient(ServerConfig(url=server.url, max_attempts=3))
        assert (await client.get("/")).text == "ok"
        await client.close()

    client = ServerClient(ServerConfig(url=server.url, max_attempts=2))
    with pytest.raises(TeacherDownError, match=r"2 attempts .* ConnectError: "):
        await client.get("/")

    await client.close()


async def test_cancelling_gives_the_slot_back(hurried):
    async with Server(hang=1) as server:
        client = ServerClient(
            ServerConfig(url=server.url, max_connections=1, timeout_s=5.0, max_attempts=1)
        )
        hanging = asyncio.create_task(client.get("/"))
        await asyncio.sleep(0.05)
        hanging.cancel()
        assert (await client.get("/")).text == "ok"
        with pytest.raises(asyncio.CancelledError):
            await hanging

        await client.close()


async def test_a_server_that_fails_on_one_request_time_and_again_is_not_away(answering, pauses):
    client, _ = answering(
        httpx.Response(503), *[httpx.Response(500, text="row 3")] * 2, max_attempts=3
    )
    with pytest.raises(SignalError, match=r"3 attempts failed, the last one with 500 .*row 3"):
        await client.get("/v1/models")

    client, _ = answering(
        httpx.Response(500),
        httpx.ConnectError("refused"),
        max_attempts=2,
    )
    with pytest.raises(TeacherDownError, match="refused"):
        await client.get("/v1/models")


async def test_a_client_that_was_closed_in_the_pause_before_its_second_attempt_is_away(
    answering, monkeypatch
):
    client, _ = answering(httpx.Response(503), httpx.Response(200))

    async def close(_pause_s):
        await client.close()

    monkeypatch.setattr("eopd.teacher.served.http.asyncio.sleep", close)
    with pytest.raises(TeacherDownError, match="closed"):
        await client.get("/v1/models")


def test_an_unexpected_answer_is_explained_without_what_it_holds():
    class Form(BaseModel):
        count: int

    with pytest.raises(ValidationError) as raised:
        Form.model_validate({"count": "Bearer secret"})

    assert explain(raised.value).startswith(
        "unexpected answer of the server, at count: Input should be a valid integer"
    )
    assert "secret" not in explain(raised.value)


HOSTS = {
    "teacher": ["10.0.0.7"],
    "teacher.ml.svc": ["10.0.0.7", "fd00::7"],
    "localhost": ["127.0.0.1", "::1"],
    "pods": ["100.64.3.1"],
    "link": ["fe80::1%eth0"],
    "api.far": ["1.1.1.1"],
    "mixed": ["10.0.0.7", "1.1.1.1"],
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def network(monkeypatch):
    """Names that resolve as ``HOSTS`` says, or not at all, and an environment with these
    proxies.
    """

    def resolve(host, port, **options):
        if host not in HOSTS and not host.replace(".", "").isdigit() and ":" not in host:
            raise socket.gaierror(-2, "Name or service not known")

        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
            for address in HOSTS.get(host, [host])
        ]

    def set_proxies(**proxies: str) -> None:
        for name in PROXIES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

        for name, proxy in proxies.items():
            monkeypatch.setenv(name, proxy)

    monkeypatch.setattr(http.socket, "getaddrinfo", resolve)

    return set_proxies


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "10.1.2.3",
        "192.168.0.9",
        "[fd00::1]",
        *(h for h in HOSTS if h not in ("api.far", "mixed")),
    ],
)
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_server_inside_is_asked_directly(host, variable, network):
    network(**{variable: "socks5://proxy:9"})  # which could not be used
    assert proxy_for(f"http://{host}:8000") is None
    ServerClient(ServerConfig(url=f"http://{host}:8000"))


@pytest.mark.parametrize(
    ("url", "proxies", "expected"),
    [
        ("http://api.far:8000", {"http_proxy": "http://proxy:9"}, "http://proxy:9"),
        ("http://api.far:8000", {"HTTP_PROXY": "proxy:9"}, "http://proxy:9"),
        ("https://api.far", {"http_proxy": "http://proxy:9"}, None),
        (
            "https://api.far",
            {"HTTPS_PROXY": "http://proxy:9", "all_proxy": "http://other:9"},
            "http://proxy:9",
        ),
        ("https://api.far", {"ALL_PROXY": "http://other:9"}, "http://other:9"),
        ("http://1.1.1.1", {"http_proxy": "http://proxy:9"}, "http://proxy:9"),
        ("http://mixed", {"http_proxy": "http://proxy:9"}, "http://proxy:9"),
        ("http://unknown.far", {"http_proxy": "http://proxy:9"}, "http://proxy:9"),
        ("http://api.far:8000", {"http_proxy": "http://proxy:9", "no_proxy": "x, .far"}, None),
        ("http://api.far:8000", {"http_proxy": "http://proxy:9", "NO_PROXY": "*"}, None),
        ("http://api.far:8000", {"http_proxy": ""}, None),
        ("http://api.far:8000", {}, None),
    ],
)
def test_a_server_outside_is_asked_as_the_environment_says(url, proxies, expected, network):
    network(**proxies)
    assert proxy_for(url) == expected


async def test_a_failure_names_the_proxy_and_not_its_password(network, pauses):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    network(http_proxy=f"http://me:secret@127.0.0.1:{port}")
    client = ServerClient(ServerConfig(url="http://api.far:8000", max_attempts=1))
    with pytest.raises(TeacherDownError) as caught:
        await client.get("/ready")

    await client.close()
    assert str(caught.value) == (
        f"GET http://api.far:8000/ready (through the proxy http://127.0.0.1:{port} of the "
        "environment): 1 attempts failed, the last one with ConnectError: All connection "
        "attempts failed"
    )


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret@proxy:9", "ftp://me:secret@proxy:9", "http://me:secret@:x"]
)
def test_a_proxy_that_cannot_be_used_is_the_user_s_mistake(proxy, network):
    network(ALL_PROXY=proxy)
    with pytest.raises(
        ConfigError, match=r"^teachers.server.url: through the proxy \w+://.+, which cannot be used"
    ) as caught:
        ServerClient(ServerConfig(url="http://api.far:8000"))

    assert "secret" not in str(caught.value)
