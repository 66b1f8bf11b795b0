"""The HTTP client of teachers that are served elsewhere: pooled, bounded, patient, and silent about
its key.

Every request has one deadline and up to ``max_attempts`` attempts. An answer that may be better
later (429, 500, 502, 503, 504), a broken connection and a missed deadline are tried again after a
pause: exponential with full jitter, so that clients of a server that came back do not meet again,
and on top of what ``Retry-After`` asks. Any other refusal is final. Requests must be safe to
repeat: scoring is.

A server inside the network is asked directly, whatever ``http_proxy`` and its like say: they are
set for the internet, on machines whose ``no_proxy`` rarely knows the names within a cluster. Only
one with a public address, or a name that does not resolve here, is asked through the proxy; its
failures name the proxy then.

Left out: ``Retry-After`` as a date, redirects, streamed bodies.
"""

import asyncio
import ipaddress
import os
import random
import re
import socket
import urllib.request
from collections.abc import Mapping
from typing import Final, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from eopd.config import ConfigError, ServerConfig
from eopd.roles import TeacherDownError
from eopd.teacher.signal import SignalError

Answer = TypeVar("Answer", bound=BaseModel)

_LATER: Final = frozenset({429, 500, 502, 503, 504})
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_QUOTE: Final = 300  # characters of a server's message


class ServerClient:
    """Speaks to one server, with at most ``max_connections`` requests in flight; the others wait
    their turn, which no deadline counts.
    """

    def __init__(
        self, config: ServerConfig, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            config: where, and how patiently.
            transport: another way to the server than the network.

        Raises:
            ConfigError: the environment variable of the key is missing, or holds what no header
                can; the proxy of the environment cannot be used.
        """
        self._key = _read_key(config.api_key_env)
        self._timeout_s = config.timeout_s
        self._max_attempts = config.max_attempts
        self.max_connections = config.max_connections
        self._slots = asyncio.Semaphore(config.max_connections)
        self._proxy = proxy_for(config.url)
        self._client = httpx.AsyncClient(
            base_url=config.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            timeout=None,  # one deadline for the whole request, ours
            transport=transport or _network(self._proxy, config.max_connections),
        )

    async def get(self, path: str) -> httpx.Response:
        """Asks for something until it is answered well, with the errors of ``post``."""
        return await self._send(self._client.build_request("GET", path))

    async def post(
        self,
        path: str,
        *,
        json: object | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send ``json`` or ``content`` until it is answered well.

        Args:
            path: below the server's url, e.g. ``/v1/completions``.
            json: a body to encode, or
            content: a body as it is.
            headers: besides our own.

        Returns:
            A complete answer of status 2xx.

        Raises:
            TeacherDownError: all attempts failed; the message names the last cause.
            SignalError: any other status, or 500 to the last; the message quotes the server.
        """
        return await self._send(
            self._client.build_request(
                "POST",
                path,
                json=json,
                content=content,
                headers=headers,
            )
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        where = f"{request.method} {request.url}{_through(self._proxy)}"
        cause, status = "", 0

        for attempt in range(self._max_attempts):
            asked_s = 0.0
            if self._client.is_closed:
                raise TeacherDownError(f"{where}: the connections were closed")

            try:
                async with self._slots, asyncio.timeout(self._timeout_s):
                    response = await self._client.send(request)
            except TimeoutError:
                status = 0
                cause = f"no answer within {self._timeout_s:g} s"
            except httpx.RequestError as error:
                status = 0
                cause = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response

                cause, status = self._quote(response), response.status_code
                if status not in _LATER:
                    raise SignalError(f"{where}: {cause}")

                asked_s = _retry_after_s(response)

            if attempt + 1 < self._max_attempts:
                await asyncio.sleep(_pause_s(attempt, asked_s))

        # A server that fails on a request time and again may well answer others.
        failure = SignalError if status == 500 else TeacherDownError
        raise failure(f"{where}: {self._max_attempts} attempts failed, the last one with {cause}")

    def _quote(self, response: httpx.Response) -> str:
        """Status and message in one short line; some servers repeat the key they refuse."""
        text = _message(response)
        if self._key:
            text = text.replace(self._key, "***")

        return f"{response.status_code} {response.reason_phrase}: {' '.join(text.split())[:_QUOTE]}"


def parse(form: type[Answer], answer: httpx.Response) -> Answer:
    """Returns an answer in the form that it must have.

    Raises:
        SignalError: it has another one.
    """
    try:
        return form.model_validate_json(answer.content)
    except ValidationError as error:
        raise SignalError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """Says where an answer has another form than expected, without what it holds: servers may
    repeat the key.
    """
    first = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"unexpected answer of the server, at {place}: {first['msg']}"


def proxy_for(url: str) -> str | None:
    """The environment's proxy for ``url``; None where the server is asked directly.

    ``http_proxy``, ``https_proxy``, ``all_proxy`` and ``no_proxy``, in either case, are read as
    Python reads them.
    """
    server = httpx.URL(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(server.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(server.netloc.decode()) or _is_inside(server.host):
        return None

    return proxy if "://" in proxy else f"http://{proxy}"


def _is_inside(host: str) -> bool:
    """Returns whether every address of a host is private, of this machine, or of this link."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False

    return not any(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found
    )


def _network(proxy: str | None, max_connections: int) -> httpx.AsyncHTTPTransport:
    limits = httpx.Limits(
        max_connections=max_connections, max_keepalive_connections=max_connections
    )
    try:
        return httpx.AsyncHTTPTransport(limits=limits, proxy=proxy)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"teachers.server.url: {_through(proxy).strip(' ()')}, which cannot be used ({error}); "
            "set no_proxy to the server's host to ask it directly"
        ) from None


def _through(proxy: str | None) -> str:
    """Says which proxy, without the password that its address may hold."""
    return (
        ""
        if proxy is None
        else f" (through the proxy {re.sub('//[^/]*@', '//', proxy)} of the environment)"
    )


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None

    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"teachers.server.api_key_env: the environment variable {variable} is not set"
        )

    if not re.fullmatch(r"[!-~]+", key):  # httpx and h11 would show it in their error
        raise ConfigError(
            f"teachers.server.api_key_env: {variable} holds characters that no key has"
        )

    return key


def _message(response: httpx.Response) -> str:
    """The sentence within the usual JSON of an error, or the whole body."""
    try:
        body = response.json()
    except ValueError:
        return response.text

    match body:
        case {"error": {"message": str(text)}} | {"message": str(text)} | {"detail": str(text)}:
            return text
        case _:
            return response.text


def _retry_after_s(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE_S) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0.0


def _pause_s(attempt: int, asked_s: float) -> float:
    """Seconds before attempt ``attempt + 1``, counted from 0: what was asked, and a random
    part of 1, 2, 4, ... 30.
    """
    return asked_s + random.uniform(0.0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt))
