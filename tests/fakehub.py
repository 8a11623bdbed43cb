"""A Hub on the loopback: the part of its HTTP API that huggingface_hub uses for model_info and snapshot_download.

Everything is in memory. Content addressing is real (git blob sha1, sha256 for LFS files, a commit is an immutable
snapshot), so that X-Repo-Commit and ETag behave as they do on the Hub. The client needs hub.env().

    with FakeHub() as hub:
        hub.add_repo("org/base", {"config.json": b"{}"})
        hub.fault(path=r"/cdn/", kind="drop", after=1000)     # or kind="status", code=503
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_faketoken"
LFS = (".safetensors", ".gguf", ".bin", ".model", ".onnx")
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by sha, and where each branch stands."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        seed = json.dumps([len(self.commits), sorted((name, oid_of(data)) for name, data in files.items())])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = files
        self.refs["main"] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        found = [sha for sha in self.commits if len(revision) > 4 and sha.startswith(revision)]
        return self.refs.get(revision) or (found[0] if len(found) == 1 else None)


class FakeHub:
    """The Hub; `log` has every request's method and path."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}
        self.log: list[dict[str, str]] = []
        self.faults: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host name: huggingface_hub follows a redirect that stays on the Hub, and sends its token there.
        self.cdn = f"http://localhost:{port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self) -> dict[str, str]:
        off = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost"}
        return {**own, **dict.fromkeys(off, "1")}

    def add_repo(self, name: str, files: Files, *, private: bool = False) -> str:
        """A repo with one commit; returns its sha."""
        self.repos[name] = Repo(private)
        return self.push(name, {".gitattributes": b"", **files})

    def push(self, name: str, files: Files) -> str:
        """Move the main branch on."""
        repo = self.repos[name]
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return repo.commit({**repo.commits.get(repo.refs.get("main", ""), {}), **files})

    def fault(self, *, path: str, kind: str, times: int = 1, **details: Any) -> None:
        """Let the next `times` requests for `path` fail: kind "drop" (after=BYTES) or "status" (code=NUMBER)."""
        self.faults.append({"path": path, "kind": kind, "times": times, **details})

    def take_fault(self, path: str) -> dict[str, Any] | None:
        with self.lock:
            for fault in self.faults:
                if fault["times"] > 0 and re.search(fault["path"], path):
                    fault["times"] -= 1
                    return fault
        return None


def oid_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.log.append({"method": self.command, "path": path})
        fault = self.hub.take_fault(path)
        if fault and fault["kind"] == "status":
            self.error(fault["code"], "", "injected")
            return
        drop = fault.get("after", 0) if fault else None
        for pattern, route in _ROUTES:
            if match := re.fullmatch(pattern, path):
                route(self, match, drop)
                return
        self.error(404, "", f"no such route: {self.command} {path}")

    do_GET = do_HEAD = answer

    def send(self, code: int, body: bytes, headers: dict[str, str], drop: int | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body if drop is None else body[:drop])
            if drop is not None:  # a reset, not a farewell
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        except OSError:
            drop = 0
        self.close_connection = drop is not None

    def send_json(self, value: object, drop: int | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, drop)

    def error(self, code: int, name: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self.send(code, body, {**headers, "X-Error-Code": name} if name else headers)

    def found(self, match: re.Match[str]) -> tuple[str, Files] | None:
        """The commit that a request names; answers with an error where there is none."""
        repo = self.hub.repos.get(match["id"])
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self.error(404 if allowed else 401, "RepoNotFound", "Repository not found")
            return None
        revision = match["revision"] or "main"
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]

    def info(self, match: re.Match[str], drop: int | None) -> None:
        if found := self.found(match):
            sha, files = found
            state = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.send_json({"_id": "0" * 24, "id": match["id"], "sha": sha, "siblings": siblings, **state}, drop)

    def tree(self, match: re.Match[str], drop: int | None) -> None:
        if found := self.found(match):
            entries = []
            for name, data in sorted(found[1].items()):
                entry: dict[str, Any] = {"type": "file", "path": name, "oid": oid_of(data), "size": len(data)}
                if name.endswith(LFS):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self.send_json(entries, drop)

    def resolve(self, match: re.Match[str], drop: int | None) -> None:
        found = self.found(match)
        if found is None:
            return
        sha, files = found
        if match["file"] not in files:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        data = files[match["file"]]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(data)}"', "Accept-Ranges": "bytes"}
        if not match["file"].endswith(LFS):
            self.content(data, headers, drop)
            return
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/cdn/{oid}"}
        self.send(302, b"", {**headers, **linked}, drop)

    def cdn(self, match: re.Match[str], drop: int | None) -> None:
        self.content(self.hub.objects[match["oid"]], {"ETag": f'"{match["oid"]}"', "Accept-Ranges": "bytes"}, drop)

    def content(self, data: bytes, headers: dict[str, str], drop: int | None) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self.send(200, data, headers, drop)
            return
        start, stop = int(span[1]), min(int(span[2] or len(data)) + 1, len(data))
        if start >= len(data):
            self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.send(206, data[start:stop], {**headers, **place}, drop)


_API = r"/api/models/(?P<id>[^/]+/[^/]+?)"
_ROUTES = (
    (_API + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    (_API + r"(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
    (r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)
