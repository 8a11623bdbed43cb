#!/usr/bin/env python3
"""fakehub: a loopback Hugging Face Hub, small enough to read, strict enough to test against.

Standard library only.  Speaks the subset of the Hub's HTTP API that huggingface_hub 2.4 uses for
model_info / snapshot_download / hf_hub_download / HfFileSystem / get_safetensors_metadata and for
create_repo / upload_file / upload_folder / create_commit over the LFS protocol (client side:
HF_ENDPOINT=http://127.0.0.1:PORT  HF_HUB_DISABLE_XET=1).

    hub = FakeHub().start()                  # in a test; hub.url, hub.log, hub.fault(...), hub.stop()
    python fakehub.py --port 8765            # stand-alone
    python fakehub.py --print-env            # export lines for a shell

Everything is kept in memory.  Content addressing is real: git blob sha1 for regular files, sha256
for LFS files, every commit is an immutable snapshot, so X-Repo-Commit / ETag behave as on the Hub.

Faults (each consumed `times` times, then gone):
    hub.fault(path=r"/resolve/", method="GET", kind="drop", after=1000)   # RST after N body bytes
    kind="status" code=503 [headers={"Retry-After": "0"}] | "stall" secs=5 | "corrupt" (flip 1 byte)
    kind="ignore_range" (200 + whole body) | "short" after=N (N body bytes, honest FIN, full length)
    kind="etag" (another one) | "long" more=N (N bytes too many, honestly told)
    kind="lost_response" (the server does the work, the client sees a reset)
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Entry:
    data: bytes  # regular content, or the LFS pointer text
    lfs: str | None = None  # sha256 of the LFS object
    size: int = 0  # real size

    @property
    def oid(self) -> str:
        return git_blob_oid(self.data)

    @property
    def etag(self) -> str:
        return self.lfs or self.oid


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Entry]
    when: float


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Entry], title: str, parent: str | None) -> Commit:
        seed = json.dumps([parent, title, sorted((p, e.oid) for p, e in files.items()), len(self.commits)])
        c = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, files, time.time())
        self.commits[c.sha] = c
        self.refs[ref] = c.sha
        return c

    def resolve(self, rev: str) -> Commit | None:
        if rev in self.refs:
            return self.commits[self.refs[rev]]
        if re.fullmatch(r"[0-9a-f]{5,40}", rev):
            hits = [c for s, c in self.commits.items() if s.startswith(rev)]
            return hits[0] if len(hits) == 1 else None
        return None


class FakeHub:
    def __init__(
        self,
        token: str | None = "hf_faketoken",
        lfs_threshold: int = 10_000_000,
        lfs_suffixes=(".safetensors", ".gguf", ".bin", ".model"),
        chunk_size: int | None = None,
        redirect_lfs: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
    ):
        self.token, self.lfs_threshold, self.lfs_suffixes = token, lfs_threshold, lfs_suffixes
        self.chunk_size, self.redirect_lfs = chunk_size, redirect_lfs
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[dict] = []
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        hub = self

        class H(_Handler):
            pass

        H.hub = hub
        self.server = _Server((host, port), H)
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_address[1]}"
        # The CDN must have another host NAME than HF_ENDPOINT: huggingface_hub follows a HEAD redirect that
        # stays on a Hub host (and then misses X-Repo-Commit), and drops the token only on a foreign host.
        self.cdn = f"http://localhost:{self.server.server_address[1]}"

    # ---- test-side API
    def start(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *a):
        self.stop()

    def env(self) -> dict[str, str]:
        e = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if self.token:
            e["HF_TOKEN"] = self.token
        return e

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        type: str = "model",
        private: bool = False,
        title: str = "initial commit",
    ) -> str:
        r = Repo(type, repo_id, private)
        self.repos[(type, repo_id)] = r
        base = {".gitattributes": self.entry(".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        base.update({p: self.entry(p, d) for p, d in (files or {}).items()})
        return r.commit("main", base, title, None).sha

    def push(self, repo_id: str, files: dict[str, bytes], type: str = "model", ref: str = "main", title="push") -> str:
        """Move a branch from the outside: the 'file changed during the merge' test."""
        r = self.repos[(type, repo_id)]
        old = r.resolve(ref)
        new = dict(old.files)
        new.update({p: self.entry(p, d) for p, d in files.items()})
        return r.commit(ref, new, title, old.sha).sha

    def read(self, repo_id: str, path: str, rev: str = "main", type: str = "model") -> bytes:
        e = self.repos[(type, repo_id)].resolve(rev).files[path]
        return self.objects[e.lfs] if e.lfs else e.data

    def listing(self, repo_id: str, rev: str = "main", type: str = "model") -> list[str]:
        return sorted(self.repos[(type, repo_id)].resolve(rev).files)

    def fault(self, *, path: str = ".*", method: str | None = None, kind: str, times: int = 1, **kw) -> None:
        self.faults.append(dict(path=path, method=method, kind=kind, times=times, **kw))

    def seen(self) -> list[str]:
        """Distinct 'METHOD route' seen so far, ids and revisions folded."""
        return sorted({f"{x['method']} {x['route']}" for x in self.log})

    # ---- helpers
    def is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (size >= self.lfs_threshold or path.endswith(tuple(self.lfs_suffixes)))

    def entry(self, path: str, data: bytes) -> Entry:
        if self.is_lfs(path, len(data)):
            oid = hashlib.sha256(data).hexdigest()
            self.objects[oid] = data
            return Entry(lfs_pointer(oid, len(data)), oid, len(data))
        return Entry(data, None, len(data))

    def take_fault(self, method: str, path: str, kinds: tuple[str, ...]) -> dict | None:
        with self.lock:
            for f in self.faults:
                if (
                    f["kind"] in kinds
                    and f["times"] > 0
                    and (f["method"] in (None, method))
                    and re.search(f["path"], path)
                ):
                    f["times"] -= 1
                    return f
        return None


_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that goes away is none."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    server_version = "fakehub"
    disable_nagle_algorithm = True  # an answer is several writes: each would wait 40 ms for the one before it

    def log_message(self, *a):
        pass

    # ---- plumbing
    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            out = b""
            while True:
                n = int(self.rfile.readline().split(b";")[0], 16)
                if n == 0:
                    self.rfile.readline()
                    return out
                out += self.rfile.read(n)
                self.rfile.readline()
        n = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(n) if n else b""
        if len(data) != n:
            raise ConnectionError("client went away mid-body")
        return data

    def _reset(self):
        """Abort the TCP connection with RST."""
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        except OSError:
            pass
        self.close_connection = True

    def _send(self, code: int, body: bytes = b"", headers: dict | None = None, ctype="application/json"):
        f = self.hub.take_fault(self.command, self.path, ("drop", "short", "corrupt", "lost_response", "etag", "long"))
        if f and f["kind"] == "lost_response":
            return self._reset()
        if f and f["kind"] == "corrupt" and body:
            i = f.get("at", len(body) // 2) % len(body)
            body = bytes(body[:i]) + bytes([body[i] ^ 0xFF]) + bytes(body[i + 1 :])
        if f and f["kind"] == "long":
            body = bytes(body) + b"x" * f.get("more", 100)
        self.send_response(code)
        h = {"Content-Type": ctype, "Content-Length": str(len(body)), "X-Request-Id": "fakehub"}
        h.update(headers or {})
        if f and f["kind"] == "etag":
            h.update({k: '"' + "0" * 64 + '"' for k in ("ETag", "X-Linked-Etag") if k in h})
        for k, v in h.items():
            self.send_header(k, v)
        if f and f["kind"] == "short":
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return None
        try:
            if f and f["kind"] in ("drop", "short"):
                self.wfile.write(body[: f.get("after", 0)])
                self.wfile.flush()
                if f["kind"] == "drop":
                    self._reset()
                self.close_connection = True
            else:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _json(self, obj, code=200, headers=None):
        self._send(code, json.dumps(obj).encode(), headers)

    def _err(self, code: int, name: str | None, msg: str, headers=None):
        h = {"X-Error-Message": msg}
        if name:
            h["X-Error-Code"] = name
        h.update(headers or {})
        self._json({"error": msg}, code, h)

    def _authed(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    # ---- dispatch
    def _go(self):
        hub = self.hub
        u = urllib.parse.urlsplit(self.path)
        raw, q = u.path, urllib.parse.parse_qs(u.query)
        try:
            body = self._body() if self.command in ("POST", "PUT", "DELETE") else b""
        except (ConnectionError, ValueError):
            self.close_connection = True
            return None
        rec = {
            "method": self.command,
            "path": self.path,
            "auth": self.headers.get("Authorization"),
            "range": self.headers.get("Range"),
            "ua": self.headers.get("User-Agent"),
            "n": len(body),
            "route": raw,
        }
        hub.log.append(rec)
        f = hub.take_fault(self.command, self.path, ("status", "stall"))
        if f and f["kind"] == "status":
            return self._err(f["code"], f.get("name"), "injected", f.get("headers"))
        if f and f["kind"] == "stall":
            time.sleep(f["secs"])
        for rx, name in _ROUTES:
            m = re.fullmatch(rx, raw)
            if m:
                rec["route"] = name.replace("_", " ", 0)
                g = {k: urllib.parse.unquote(v) if v is not None else None for k, v in m.groupdict().items()}
                return getattr(self, "r_" + name)(g, q, body)
        rec["route"] = "UNKNOWN " + raw
        self._err(404, None, f"no such route: {self.command} {raw}")
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _go

    def _repo(self, g) -> Repo | None:
        t = _TYPES.get(g.get("t") or "models", "model")
        r = self.hub.repos.get((t, g["id"]))
        if r is None or (r.private and not self._authed()):
            self._err(401 if not self._authed() else 404, "RepoNotFound", "Repository not found")
            return None
        return r

    def _rev(self, r: Repo, rev: str) -> Commit | None:
        c = r.resolve(rev or "main")
        if c is None:
            self._err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return c

    def _need_write(self) -> bool:
        if self._authed():
            return True
        self._err(401, None, "Invalid username or password.")
        return False

    # ---- read API
    def r_info(self, g, q, body):
        if (r := self._repo(g)) and (c := self._rev(r, g.get("rev") or "main")):
            self._json(
                {
                    "_id": "0" * 24,
                    "id": r.id,
                    "modelId": r.id,
                    "author": r.id.split("/")[0],
                    "sha": c.sha,
                    "private": r.private,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "siblings": [{"rfilename": p} for p in sorted(c.files)],
                }
            )

    def _info_of(self, p: str, e: Entry) -> dict:
        d = {"type": "file", "path": p, "oid": e.oid, "size": e.size}
        if e.lfs:
            d["lfs"] = {"oid": e.lfs, "size": e.size, "pointerSize": len(e.data)}
        return d

    def _tree(self, c: Commit, sub: str, recursive: bool) -> list[dict]:
        pre = sub.strip("/") + "/" if sub else ""
        out, dirs = [], {}
        for p, e in sorted(c.files.items()):
            if not p.startswith(pre):
                continue
            rest = p[len(pre) :].split("/")
            for i in range(1, len(rest) if recursive else min(2, len(rest))):
                d = pre + "/".join(rest[:i])
                dirs[d] = {"type": "directory", "path": d, "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0}
            if recursive or len(rest) == 1:
                out.append(self._info_of(p, e))
        return list(dirs.values()) + out

    def r_tree(self, g, q, body):
        if (r := self._repo(g)) and (c := self._rev(r, g["rev"])):
            sub = g.get("sub") or ""
            t = self._tree(c, sub, q.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if sub and not t:
                return self._err(404, "EntryNotFound", f"{sub} does not exist")
            self._json(t)
        return None

    def r_paths_info(self, g, q, body):
        if (r := self._repo(g)) and (c := self._rev(r, g["rev"])):
            if self.headers.get("Content-Type", "").startswith("application/json"):
                paths = json.loads(body)["paths"]
            else:
                paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
            out = []
            for p in [paths] if isinstance(paths, str) else paths:
                if p in c.files:
                    out.append(self._info_of(p, c.files[p]))
                elif any(x.startswith(p.rstrip("/") + "/") for x in c.files):
                    out.append({"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest(), "size": 0})
            self._json(out)

    def r_refs(self, g, q, body):
        if r := self._repo(g):
            self._json(
                {
                    "branches": [
                        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s}
                        for n, s in r.refs.items()
                        if not n.startswith("refs/")
                    ],
                    "tags": [],
                    "converts": [],
                }
            )

    def r_commits(self, g, q, body):
        if (r := self._repo(g)) and (c := self._rev(r, g["rev"])):
            out = []
            while c:
                out.append(
                    {
                        "id": c.sha,
                        "title": c.title,
                        "message": "",
                        "date": "2026-01-01T00:00:00.000Z",
                        "authors": [{"user": "fake"}],
                    }
                )
                c = r.commits.get(c.parent) if c.parent else None
            self._json(out)

    def r_resolve(self, g, q, body):
        if not ((r := self._repo(g)) and (c := self._rev(r, g["rev"]))):
            return None
        e = c.files.get(g["path"])
        if e is None:
            return self._err(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": c.sha})
        h = {"X-Repo-Commit": c.sha, "ETag": f'"{e.etag}"', "Accept-Ranges": "bytes"}
        if e.lfs:
            h.update({"X-Linked-Etag": f'"{e.lfs}"', "X-Linked-Size": str(e.size)})
            if self.hub.redirect_lfs:
                h["Location"] = f"{self.hub.cdn}/cdn/{e.lfs}"
                return self._send(302, b"", h)
        self._bytes(self.hub.objects[e.lfs] if e.lfs else e.data, h)
        return None

    def r_cdn(self, g, q, body):
        d = self.hub.objects.get(g["oid"])
        if d is None:
            return self._err(404, None, "no such object")
        self._bytes(d, {"ETag": f'"{g["oid"]}"', "Accept-Ranges": "bytes"})
        return None

    def _bytes(self, data: bytes, h: dict):
        rng = self.headers.get("Range")
        if rng and not self.hub.take_fault(self.command, self.path, ("ignore_range",)):
            m = re.fullmatch(r"bytes=(\d*)-(\d*)", rng)
            a, b = (m.group(1), m.group(2)) if m else ("", "")
            if not m or (not a and not b):
                return self._err(400, None, "bad range")
            if a:
                lo, hi = int(a), min(int(b) if b else len(data) - 1, len(data) - 1)
            else:
                lo, hi = max(0, len(data) - int(b)), len(data) - 1
            if lo >= len(data) or hi < lo:
                return self._send(416, b"", {**h, "Content-Range": f"bytes */{len(data)}"})
            h = {**h, "Content-Range": f"bytes {lo}-{hi}/{len(data)}"}
            return self._send(206, memoryview(data)[lo : hi + 1], h, "application/octet-stream")
        self._send(200, data, h, "application/octet-stream")
        return None

    def r_whoami(self, g, q, body):
        if not self._authed() or not self.headers.get("Authorization"):
            return self._err(401, None, "Invalid user token.")
        self._json(
            {
                "type": "user",
                "id": "1",
                "name": "fake",
                "fullname": "Fake",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            }
        )
        return None

    def r_auth_check(self, g, q, body):
        if self._repo(g):
            self._json({})

    # ---- write API
    def r_branch(self, g, q, body):
        if not self._need_write() or not (r := self._repo(g)):
            return None
        if self.command == "DELETE":
            if r.refs.pop(g["branch"], None) is None:
                return self._err(404, "RevisionNotFound", f"Invalid rev id: {g['branch']}")
            return self._send(200)
        if g["branch"] in r.refs:
            return self._err(409, None, "Reference already exists")
        if (c := self._rev(r, json.loads(body or b"{}").get("startingPoint") or "main")) is None:
            return None
        r.refs[g["branch"]] = c.sha
        return self._json({}, 201)

    def r_create(self, g, q, body):
        if not self._need_write():
            return None
        p = json.loads(body)
        rid = f"{p.get('organization') or 'fake'}/{p['name']}"
        t = p.get("type") or "model"
        url = f"{self.hub.url}/{'' if t == 'model' else t + 's/'}{rid}"
        with self.hub.lock:
            if (t, rid) in self.hub.repos:
                return self._json({"error": "You already created this model repo", "url": url}, 409)
            self.hub.add_repo(rid, {}, t, p.get("private", False) or p.get("visibility") == "private")
        self._json({"url": url, "name": rid, "id": "0"})
        return None

    def r_validate_yaml(self, g, q, body):
        self._json({"errors": [], "warnings": []})

    def r_preupload(self, g, q, body):
        if not self._need_write() or not (r := self._repo(g)) or not (c := self._rev(r, g["rev"])):
            return
        out = []
        for f in json.loads(body)["files"]:
            old = c.files.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if self.hub.is_lfs(f["path"], f["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": (old.lfs or old.oid) if old else None,
                }
            )
        self._json({"files": out, "commitOid": c.sha})

    def r_lfs_batch(self, g, q, body):
        if not self._need_write() or not self._repo(g):
            return
        p = json.loads(body)
        out = []
        for o in p["objects"]:
            d = {"oid": o["oid"], "size": o["size"], "authenticated": True}
            if o["oid"] not in self.hub.objects:
                up = f"{self.hub.url}/lfs/put/{o['oid']}"
                ck = self.hub.chunk_size
                if ck and o["size"] > ck and "multipart" in p.get("transfers", []):
                    n = -(-o["size"] // ck)
                    act = {
                        "href": f"{self.hub.url}/lfs/complete/{o['oid']}",
                        "header": {"chunk_size": str(ck), **{f"{i:05d}": f"{up}?part={i}" for i in range(1, n + 1)}},
                    }
                else:
                    act = {"href": up, "header": {}}
                d["actions"] = {"upload": act, "verify": {"href": f"{self.hub.url}/lfs/verify", "header": {}}}
            out.append(d)
        self._json(
            {"transfer": "multipart" if self.hub.chunk_size else "basic", "objects": out},
            headers={"Content-Type": "application/vnd.git-lfs+json"},
        )

    def r_lfs_put(self, g, q, body):
        if "part" in q:
            self.hub.parts.setdefault(g["oid"], {})[int(q["part"][0])] = body
            return self._send(200, b"", {"ETag": hashlib.md5(body).hexdigest()})
        return self._store(g["oid"], body)

    def r_lfs_complete(self, g, q, body):
        want = [(x["partNumber"], x["etag"]) for x in json.loads(body)["parts"]]
        got = self.hub.parts.pop(g["oid"], {})
        if [(n, hashlib.md5(got.get(n, b"")).hexdigest()) for n, _ in want] != want:
            return self._err(400, None, "part mismatch")
        self._store(g["oid"], b"".join(got[n] for n, _ in want))
        return None

    def _store(self, oid: str, data: bytes):
        if hashlib.sha256(data).hexdigest() != oid:
            return self._err(400, None, "sha256 of the body is not the oid")
        self.hub.objects[oid] = data
        self._send(200, b"", {"ETag": f'"{oid}"'})
        return None

    def r_lfs_verify(self, g, q, body):
        p = json.loads(body)
        d = self.hub.objects.get(p["oid"])
        if d is None or len(d) != p["size"]:
            return self._err(404, None, "object missing or of another size")
        self._json({})
        return None

    def r_commit(self, g, q, body):
        if not self._need_write() or not (r := self._repo(g)) or not (c := self._rev(r, g["rev"])):
            return None
        files, title = dict(c.files), "commit"
        for line in body.splitlines():
            if not line.strip():
                continue
            o = json.loads(line)
            k, v = o["key"], o["value"]
            if k == "header":
                title = v["summary"]
                if v.get("parentCommit") and not c.sha.startswith(v["parentCommit"]):
                    return self._err(412, None, "A commit has happened since. Please refresh and try again.")
            elif k == "file":
                files[v["path"]] = Entry(d := base64.b64decode(v["content"]), None, len(d))
            elif k == "lfsFile":
                if v["oid"] not in self.hub.objects:
                    return self._err(400, None, f"LFS object {v['oid']} was not uploaded")
                n = len(self.hub.objects[v["oid"]])
                files[v["path"]] = Entry(lfs_pointer(v["oid"], n), v["oid"], n)
            elif k == "deletedFile":
                if files.pop(v["path"], None) is None:
                    return self._err(404, "EntryNotFound", "A file with this name doesn't exist")
            elif k == "deletedFolder":
                for p in [p for p in files if p.startswith(v["path"].rstrip("/") + "/")]:
                    del files[p]
            else:
                return self._err(400, None, f"unknown key {k}")
        with self.hub.lock:
            n = r.commit(g["rev"] if g["rev"] in r.refs else "main", files, title, c.sha)
        self._json(
            {
                "success": True,
                "commitOid": n.sha,
                "commitUrl": f"{self.hub.url}/{r.id}/commit/{n.sha}",
                "hookOutput": "",
            }
        )
        return None


_ID = r"(?P<id>[^/]+/[^/]+?)"
_API = r"/api/(?P<t>models|datasets|spaces)/" + _ID
_ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate_yaml"),
    (_API + r"/tree/(?P<rev>[^/]+)(?:/(?P<sub>.+))?", "tree"),
    (_API + r"/paths-info/(?P<rev>[^/]+)", "paths_info"),
    (_API + r"/refs", "refs"),
    (_API + r"/commits/(?P<rev>[^/]+)", "commits"),
    (_API + r"/auth-check", "auth_check"),
    (_API + r"/branch/(?P<branch>[^/]+)", "branch"),
    (_API + r"/preupload/(?P<rev>[^/]+)", "preupload"),
    (_API + r"/commit/(?P<rev>[^/]+)", "commit"),
    (_API + r"(?:/revision/(?P<rev>[^/]+))?", "info"),
    (r"/(?:(?P<t>datasets|spaces)/)?" + _ID + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/lfs/put/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"/lfs/complete/(?P<oid>[0-9a-f]{64})", "lfs_complete"),
    (r"/lfs/verify", "lfs_verify"),
    (r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    (r"/(?:(?P<t>datasets|spaces)/)?" + _ID + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--port", type=int, default=0)
    ap.add_argument("--token", default="hf_faketoken")
    ap.add_argument("--chunk-size", type=int)
    ap.add_argument("--no-redirect", action="store_true")
    ap.add_argument("--print-env", action="store_true")
    a = ap.parse_args()
    hub = FakeHub(token=a.token or None, port=a.port, chunk_size=a.chunk_size, redirect_lfs=not a.no_redirect)
    for k, v in hub.env().items():
        print(f"export {k}={v}" if a.print_env else f"{k}={v}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        hub.server.serve_forever()


if __name__ == "__main__":
    main()
