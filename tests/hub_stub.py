"""A Hub on this machine: just enough of its HTTP interface to create, write and read repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its branches, each with its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None  # status and error code of every answer
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str) -> Files | None:
        branches = self.repos.get(repo, {})
        by_commit = {commit_of(files): files for files in branches.values()}
        return branches.get(revision, by_commit.get(revision))


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()  # as long as a commit's name


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing on the error stream."""

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].replace("%2F", "/")  # in names of branches
        self.server.requests.append(f"{self.command} {path}")
        if self.server.refusal is not None:
            return self.refuse(*self.server.refusal)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, content, *match.groups())
        return self.refuse(404, "EntryNotFound")

    do_GET = do_POST = do_HEAD = handle_request  # noqa: N815  # names that the base class asks for

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if repo in self.server.repos:
            return self.answer({"url": f"{self.server.address}/{repo}"}, 409)
        self.server.repos[repo] = {"main": {}}
        self.server.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"  # differs by version
        return self.answer({"url": f"{self.server.address}/{repo}"})

    def branch(self, content: bytes, repo: str, revision: str) -> None:
        branches = self.server.repos[repo]
        branches.setdefault(revision, dict(branches["main"]))
        self.answer({})

    def preupload(self, content: bytes, repo: str, revision: str) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(content)["files"]
        ]
        self.answer({"files": files})

    def commit(self, content: bytes, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        files = self.server.repos[repo][revision]
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
        oid = commit_of(files)
        self.answer({"commitUrl": f"{self.server.address}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def yaml(self, content: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def info(self, content: bytes, repo: str, revision: str = "main") -> None:
        if repo not in self.server.repos:
            return self.refuse(404, "RepoNotFound")
        files = self.server.files(repo, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.answer({"id": repo, "sha": commit_of(files), "siblings": siblings, "private": False})

    def tree(self, content: bytes, repo: str, revision: str) -> None:
        files = self.server.files(repo, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound" if repo in self.server.repos else "RepoNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return self.answer(entries)

    def resolve(self, content: bytes, repo: str, revision: str, name: str) -> None:
        files = self.server.files(repo, revision)
        if files is None or name not in files:
            return self.refuse(404, "EntryNotFound")
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=commit_of(files))


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.yaml),
    (rf"POST /api/models/{REPO}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(.+)", Handler.commit),
    (rf"GET /api/(?:models|datasets)/{REPO}/revision/(.+)", Handler.info),
    (rf"GET /api/(?:models|datasets)/{REPO}", Handler.info),
    (rf"GET /api/(?:models|datasets)/{REPO}/tree/(.+)", Handler.tree),
    (rf"(?:GET|HEAD) /(?:datasets/)?{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
