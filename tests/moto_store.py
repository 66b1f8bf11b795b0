"""An object store on this machine: moto's server, whose requests can be watched, slowed down and
refused, and which can be away for a while.
"""

import json
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, make_server

Environ = dict[str, Any]


class QuietHandler(MotoRequestHandler):
    """Logs no requests."""

    def log_request(self, *arguments: object) -> None:
        pass


class Store:
    """The server, and what it holds. ``before`` is called with method and path of every request; it
    returns an HTTP status to refuse the request with, or None.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[str, str], str | None] = lambda method, path: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self._port = 0
        self.start()
        self.clear()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if (status := self.before(method, path)) is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Length", "0")])
            return [b""]

        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def start(self) -> None:
        """Answer, at the same address as before."""
        self._server = make_server(
            "127.0.0.1", self._port, self, threaded=True, request_handler=QuietHandler
        )
        self._port = self._server.server_port
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Go away; what is held is kept."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        """Hold one empty bucket, and refuse nothing."""
        self.before = lambda method, path: None
        self.requests.clear()
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.reset()
        backend.create_bucket(self._bucket, "us-east-1")

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a program finds the store."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def objects(self) -> dict[str, bytes]:
        """What is held, by key, read past the server."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self._bucket].keys
        found = {name: keys.get(name) for name in list(keys)}
        return {name: key.value for name, key in found.items() if key is not None}

    def whole_steps(self, run: str) -> list[int]:
        """The checkpoints of a run whose manifest is there.

        Raises:
            AssertionError: one lacks a file that its manifest names, or has another size.
        """
        objects = self.objects()
        steps = []
        for name in objects:
            folder, _, last = name.rpartition("/")
            if last == "manifest.json" and name.startswith(f"{run}/checkpoints/"):
                steps.append(int(folder.rpartition("-")[2]))
                for file, entry in json.loads(objects[name])["files"].items():
                    assert len(objects[f"{folder}/{file}"]) == entry["bytes"], (folder, file)

        return sorted(steps)
