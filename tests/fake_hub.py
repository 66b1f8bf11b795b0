"""A Hub of our own: what ``huggingface_hub`` and ``datasets`` ask of the real one, over HTTP.

It holds repositories with commits, some of them gated or private, and takes uploads. A test gives
its address to a process as ``HF_ENDPOINT``.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"
Files = Mapping[str, bytes]


@dataclass
class Repository:
    kind: str  # "models" or "datasets"
    name: str
    gated: bool = False
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        """Add a commit on top of a branch; returns its hash."""
        content = repr((self.name, len(self.commits), sorted(files))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """The repositories of a Hub by kind and name, and the requests that it got."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.url = ""

    def add(self, kind: str, name: str, files: Files, **options: bool) -> Repository:
        repository = Repository(kind, name, **options)
        repository.commit(files)
        self.repositories[kind, name] = repository
        return repository

    def downloads(self) -> list[str]:
        """The files that were fetched, in order of their names."""
        return sorted(
            line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET /org")
        )


@contextmanager
def running() -> Iterator[FakeHub]:
    """Serve a Hub at ``hub.url`` while the block runs."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")

        try:
            self._route(path.strip("/").split("/"), body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b"{}", headers)

    def _route(self, parts: list[str], body: bytes) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                self._require_token()
                self._send_json({"name": "org", "type": "user", "orgs": [], "auth": {}})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._send_json({"warnings": [], "errors": []})
            case ["api", kind, owner, name, *rest] if kind in ("models", "datasets"):
                self._api(self._open(kind, f"{owner}/{name}"), rest, body)
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._resolve(
                    self._open("datasets", f"{owner}/{name}"),
                    revision,
                    "/".join(file),
                )
            case [owner, name, "resolve", revision, *file]:
                self._resolve(
                    self._open("models", f"{owner}/{name}"),
                    revision,
                    "/".join(file),
                )
            case _:
                raise _Refused(404)

    def _api(self, repository: Repository, rest: list[str], body: bytes) -> None:
        match rest:
            case []:
                self._info(repository, "main")
            case ["revision", revision]:
                self._info(repository, revision)
            case ["tree", revision, *folder]:
                self._tree(repository, revision, unquote("/".join(folder)))
            case ["paths-info", revision]:
                self._paths(repository, revision, body)
            case ["preupload", _]:
                files = json.loads(body)["files"]
                modes = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in files
                ]
                self._send_json({"files": modes})
            case ["commit", _]:
                self._commit(repository, body)
            case _:
                raise _Refused(404)

    def _open(self, kind: str, name: str) -> Repository:
        """A gated repository tells what it is to everybody; a private one does not exist."""
        repository = self.hub.repositories.get((kind, unquote(name)))
        if repository is None or (repository.private and not self._has_token()):
            raise _Refused(
                404 if self._has_token() else 401, "RepoNotFound", "Repository not found"
            )

        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.find(unquote(revision))
        if sha is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")

        return sha

    def _info(self, repository: Repository, revision: str) -> None:
        sha = self._commit_of(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        info = {"id": repository.name, "sha": sha, "siblings": siblings, "tags": []}
        self._send_json(info | {"private": repository.private, "downloads": 0, "likes": 0})

    def _tree(self, repository: Repository, revision: str, folder: str) -> None:
        sha = self._commit_of(repository, revision)
        files = repository.commits[sha].items()
        listed = [_entry(name, content) for name, content in files if name.startswith(folder)]
        if not listed and folder:
            raise _Refused(404, "EntryNotFound", "not here")

        self._send_json(listed)

    def _paths(self, repository: Repository, revision: str, body: bytes) -> None:
        sha = self._commit_of(repository, revision)
        asked = json.loads(body)["paths"]
        files = repository.commits[sha].items()
        self._send_json([_entry(name, content) for name, content in files if name in asked])

    def _resolve(self, repository: Repository, revision: str, file: str) -> None:
        if repository.gated:
            self._require_access()

        sha = self._commit_of(repository, revision)
        content = repository.commits[sha].get(unquote(file))
        headers = {"X-Repo-Commit": sha}
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")

        self._send(200, content, headers | {"ETag": f'"{_oid(content)}"'})

    def _create(self, wanted: dict[str, Any]) -> None:
        self._require_token()
        name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        if ("models", name) in self.hub.repositories:
            raise _Refused(409, message="You already created this model repo")

        self.hub.created.append(wanted)
        self.hub.add("models", name, {}, private=wanted.get("visibility") == "private")
        self._send_json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _commit(self, repository: Repository, body: bytes) -> None:
        self._require_token()
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        sha = repository.commit({**repository.commits[repository.refs["main"]], **files})
        url = f"{self.hub.url}/{repository.name}/commit/{sha}"
        self._send_json({"commitUrl": url, "commitOid": sha, "commitMessage": "", "hookOutput": ""})

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self) -> None:
        if not self._has_token():
            raise _Refused(401, message="Invalid credentials in Authorization header")

    def _require_access(self) -> None:
        """A gated file is told 401 to a stranger, and 403 to one who has not asked."""
        if "Authorization" not in self.headers:
            raise _Refused(401, "GatedRepo", "Access to this model is restricted")

        if not self._has_token():
            raise _Refused(403, "GatedRepo", "You have not asked for access")

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        start, stop = 0, len(body)
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(body) - 1) + 1, len(body))
            status = 206

        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)

        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")

        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start:stop])


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
