"""Ranges of a file on a web server, the Hub's among them: every answer is checked before a byte of it counts.

Through huggingface_hub's own session, so proxies, certificates and its offline mode apply. The Hub answers with a
redirect to a store elsewhere, whose address is used until it expires; the token goes to the Hub alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mergeforge.errors import SourceError
from mergeforge.io.remote.retry import Passing, Patience, is_passing

TIMEOUT = 30.0  # seconds in which something must come
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403, 404, 410)  # of an address that a redirect gave
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
Headers = Mapping[str, str]


def no_headers() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Answer:
    """An answer's status, headers, those of the redirects that led to it, address, and body."""

    status: int
    headers: Headers
    before: tuple[Headers, ...]
    url: str
    body: Iterator[bytes]


class WebRanges:
    """A file behind a URL, as it was when it was looked at: `etag` and `size`.

    `location`: where a redirect led; `secret`: makes the headers that the URL's own server gets.
    """

    def __init__(
        self,
        path: str,
        url: str,
        size: int,
        etag: str,
        *,
        sha256: str = "",
        location: str = "",
        secret: Callable[[], Mapping[str, str]] = no_headers,
    ) -> None:
        self.path = path
        self.url = url
        self.size = size
        self.etag = etag
        self.sha256 = sha256
        self._location = location or url
        self._secret = secret
        self._etags = {origin(url): etag}

    def fetch(self, buffer: memoryview, offset: int, stopped: threading.Event) -> None:
        """Fill the buffer; after a failure it goes on behind what has come. Raises SourceError."""
        done, patience = 0, Patience(self.path, stopped)
        while done < len(buffer):
            try:
                for data in self._ask(offset + done, offset + len(buffer)):
                    if done + len(data) > len(buffer):
                        raise Passing("the answer is longer than what was asked for")
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    patience.renew()
                if done < len(buffer):
                    raise Passing("the answer is shorter than what was asked for")
            except SourceError:
                raise
            except Exception as error:
                if not is_passing(error):
                    raise SourceError(f"{self.path} cannot be read: {type(error).__name__}") from error
                patience.wait(error)

    def check(self) -> None:
        """Nothing: each answer was compared when it came."""

    def _ask(self, start: int, stop: int) -> Iterator[bytes]:
        url = self._location
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if origin(url) == origin(self.url):
            headers |= self._secret()
        with answered(url, headers) as answer:
            self._check(answer, start, stop, url)
            self._location = answer.url
            yield from answer.body

    def _check(self, answer: Answer, start: int, stop: int, asked: str) -> None:
        """Raise Passing or SourceError unless the answer's body is the range that was asked for."""
        status = answer.status
        if status in _AGAIN:
            raise Passing(f"the server says {status}", _seconds(answer.headers.get("Retry-After")))
        if status in _EXPIRED and (asked != self.url or answer.before):
            self._location = self.url
            raise Passing(f"the server says {status}")
        if status in (412, 416):
            raise self._changed()
        if status not in (200, 206):
            hint = "`hf auth login` with a token that may read there" if status in (401, 403) else ""
            raise SourceError(f"{self.path} cannot be read: the server says {status}", hint=hint)
        if self._is_other(answer):
            raise self._changed()
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise Passing("the answer is compressed")
        if status == 200 and (start, stop) != (0, self.size):
            raise Passing("the server does not answer with the range that was asked for")
        self._check_extent(answer, start, stop)

    def _check_extent(self, answer: Answer, start: int, stop: int) -> None:
        told = answer.headers.get("Content-Range")
        if answer.status == 206:
            match = _CONTENT_RANGE.fullmatch(told or "")
            if match and match[3] not in ("*", str(self.size)):
                raise self._changed()
            if not match or (int(match[1]), int(match[2])) != (start, stop - 1):
                raise Passing(f"the answer is another range ({told})")
        length = answer.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            if answer.status == 200:
                raise self._changed()
            raise Passing("the answer is not as long as what was asked for")

    def _is_other(self, answer: Answer) -> bool:
        """Whether the answer, or a redirect before it, tells of other content than was pinned."""
        if any(etag_of(one) not in ("", self.etag) for one in answer.before if "X-Linked-Etag" in one):
            return True
        told = etag_of(answer.headers)
        return told != "" and self._etags.setdefault(origin(answer.url), told) != told

    def _changed(self) -> SourceError:
        return SourceError(f"{self.path} changed while it was read", hint="run again once nobody writes to it")


@contextmanager
def answered(url: str, headers: Headers, method: str = "GET") -> Iterator[Answer]:
    """Ask, following redirects; a token given in `headers` goes to the URL's own server alone."""
    from huggingface_hub import get_session

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):  # httpx: huggingface_hub 1 and later
        with session.stream(method, url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as one:
            before = tuple(earlier.headers for earlier in one.history)
            yield Answer(one.status_code, one.headers, before, str(one.url), one.iter_raw())
    else:  # requests
        with session.request(method, url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=True) as one:
            before = tuple(earlier.headers for earlier in one.history)
            body = one.raw.stream(1 << 16, decode_content=False)
            yield Answer(one.status_code, one.headers, before, str(one.url), body)


def etag_of(headers: Headers) -> str:
    """What stands for a content: the Hub's etag of the file, the server's own, or when it was changed; else ""."""
    told = headers.get("X-Linked-Etag") or headers.get("ETag") or headers.get("Last-Modified") or ""
    return told.removeprefix("W/").strip('"')


def origin(url: str) -> tuple[str, str]:
    """Scheme and server of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
