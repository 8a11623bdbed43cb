"""Read a file by ranges from a server that fails in many ways: the right bytes, or an error."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
import pytest
from support.fake_hub import FakeHub

from mergeforge.errors import SourceError
from mergeforge.io.remote import RemoteFile, RemoteSession, http, ranged_file, retry
from mergeforge.io.remote.http import HTTPRanges
from mergeforge.io.remote.session import RangeCache

DATA = np.random.default_rng(0).bytes(3_000_000)
OID = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.01,) * 4)
    monkeypatch.setattr(http, "TIMEOUT", 2.0)


@pytest.fixture
def hub() -> Any:
    with FakeHub() as hub:
        hub.add_repo("org/m", {"model.safetensors": DATA})
        yield hub


def opened(hub: FakeHub, data: bytes = DATA) -> RemoteFile:
    """The file after the Hub has redirected to its storage."""
    oid = hashlib.sha256(data).hexdigest()
    url = f"{hub.url}/org/m/resolve/main/model.safetensors"
    ranges = HTTPRanges("m", url, len(data), oid, sha256=oid, location=f"{hub.cdn}/cdn/{oid}")
    return RemoteFile(ranges, RemoteSession(4 << 20))


def read(file: RemoteFile, start: int = 0, stop: int = len(DATA), *, keep: bool = False) -> bytes:
    buffer = bytearray(stop - start)
    file.read_into(memoryview(buffer), start, keep=keep)
    return bytes(buffer)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (7, 700_000), (524_280, 524_300), (1, 3_000_000), (5, 5)])
def test_reads_any_range(hub: FakeHub, start: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_file, "REQUEST_NBYTES", 300_000)
    for keep in (False, True):
        assert read(opened(hub), start, stop, keep=keep) == DATA[start:stop]


TRANSIENT: list[dict[str, Any]] = [
    {"kind": "drop", "after": 100_000, "times": 9},
    {"kind": "short", "after": 1_000_000, "times": 2},
    {"kind": "status", "code": 503, "headers": {"Retry-After": "0"}, "times": 3},
    {"kind": "status", "code": 429, "times": 3},
    {"kind": "status", "code": 500, "times": 3},
    {"kind": "status", "code": 403, "times": 1},
    {"kind": "ignore_range", "times": 3},
    {"kind": "long", "times": 3},
    {"kind": "stall", "secs": 3},
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda fault: f"{fault['kind']}{fault.get('code', '')}")
def test_retries_transient_failures(hub: FakeHub, fault: dict[str, Any]) -> None:
    hub.fault(path="/cdn/", method="GET", **fault)
    assert read(opened(hub), 100, 2_000_000) == DATA[100:2_000_000]
    assert all(injected["times"] == 0 for injected in hub.faults), "the fault occurred"


def test_resumes_where_the_connection_broke(hub: FakeHub) -> None:
    hub.fault(path="/cdn/", kind="drop", after=500_000)
    read(opened(hub), 0, 2_000_000)
    first, second = (request["range"] for request in hub.log)
    assert first == "bytes=0-1999999"
    assert 0 < int(second.removeprefix("bytes=").split("-")[0]) <= 500_000


def test_requests_an_expired_url_again(hub: FakeHub) -> None:
    """Only the Hub's own server sees the token."""
    hub.fault(path="/cdn/", kind="status", code=403)
    file = opened(hub)
    file.ranges._secret = lambda: {"Authorization": f"Bearer {hub.token}"}  # type: ignore[attr-defined]
    assert read(file, 0, 900_000) == DATA[:900_000]
    assert ["/resolve/" in request["path"] for request in hub.log] == [False, True, False]
    assert [request["auth"] is None for request in hub.log] == [True, False, True]


@pytest.mark.parametrize("kind", ["drop", "short", "long", "ignore_range", "status"])
def test_a_permanent_failure_is_an_error(hub: FakeHub, kind: str) -> None:
    hub.fault(path="/cdn/", kind=kind, times=99, code=503)
    with pytest.raises(SourceError, match="m cannot be read") as caught:
        read(opened(hub), 100, 900_000)
    assert "run the same command again" in caught.value.hint


def test_detects_a_changed_etag(hub: FakeHub) -> None:
    file = opened(hub)
    read(file, 0, 900_000)
    hub.fault(path="/cdn/", kind="etag")
    with pytest.raises(SourceError, match="changed while it was read"):
        read(file, 900_000, 1_800_000)


def test_detects_a_file_that_is_replaced(hub: FakeHub) -> None:
    """The URL expires, and the branch then leads to another content."""
    file = opened(hub)
    read(file, 0, 900_000)
    hub.push("org/m", {"model.safetensors": DATA[::-1]})
    hub.fault(path="/cdn/", kind="status", code=403)
    with pytest.raises(SourceError, match="changed while it was read"):
        read(file, 900_000, 1_800_000)


def test_detects_a_changed_size(hub: FakeHub) -> None:
    file = opened(hub)
    file.ranges.size += 1  # type: ignore[misc]
    with pytest.raises(SourceError, match="changed while it was read"):
        read(file, 0, 900_000)
    with pytest.raises(SourceError, match="ends at byte 3000001"):
        read(file, 0, 3_000_002)


def test_a_small_file_is_fetched_whole_and_checked_by_sha256(hub: FakeHub) -> None:
    small = DATA[:1000]
    hub.push("org/m", {"model.safetensors": small})
    hub.fault(path="/cdn/", kind="corrupt")
    assert read(opened(hub, small), 10, 20) == small[10:20]
    assert [request["range"] for request in hub.log] == ["bytes=0-999"] * 2
    hub.fault(path="/cdn/", kind="corrupt", times=2)
    with pytest.raises(SourceError, match="came damaged twice"):
        read(opened(hub, small), 10, 20)


def test_small_reads_share_a_chunk(hub: FakeHub) -> None:
    file = opened(hub)
    for start in range(0, 500_000, 50_000):
        read(file, start, start + 100)
    assert len(hub.log) == 1


def test_closing_a_file_ends_the_waits(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (60.0,))
    hub.fault(path="/cdn/", kind="status", code=503, times=99)
    file = opened(hub)
    threading.Timer(0.3, file.close).start()
    with pytest.raises(SourceError, match="was stopped"):
        read(file)
    hub.faults.clear()
    assert read(file) == DATA, "it can be read again"


def test_the_cache_is_bounded_and_fetches_once() -> None:
    cache, fetched = RangeCache(100), []

    def fetch(key: int) -> bytes:
        fetched.append(key)
        return bytes(40)

    for key in (1, 2, 1, 3, 1, 2):
        cache.get(key, lambda key=key: fetch(key))
    assert fetched == [1, 2, 3, 2], "2 was the least recently used when 3 was added"
    with pytest.raises(OSError):
        cache.get(4, lambda: (_ for _ in ()).throw(OSError()))
    assert cache.get(4, lambda: b"later") == b"later"
