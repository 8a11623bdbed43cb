"""HTTPRanges: byte ranges of a file on a web server (or the Hub). Every response is checked before it is used.

Requests use huggingface_hub's session, so its proxies, certificates and offline mode apply. The Hub redirects to a
storage server, whose URL is used until it expires; the token is sent to the Hub only.
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
from mergeforge.io.remote.retry import RetryPolicy, TransientError, is_transient

TIMEOUT = 30.0  # seconds without data
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED_STATUS = (400, 401, 403, 404, 410)  # of a URL that came from a redirect
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
Headers = Mapping[str, str]


def no_headers() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class HTTPResponse:
    """A response: status, headers, the headers of its redirects, final URL, body."""

    status: int
    headers: Headers
    redirects: tuple[Headers, ...]
    url: str
    body: Iterator[bytes]


class HTTPRanges:
    """A file behind a URL, pinned to the state with this `etag` and `size`.

    `location`: the URL that it redirects to; `secret`: returns the headers that only the server of `url` gets.
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
        """Fill the buffer; after a failure, continue after the bytes that have arrived. Raises SourceError."""
        done, policy = 0, RetryPolicy(self.path, stopped)
        while done < len(buffer):
            try:
                for data in self._request(offset + done, offset + len(buffer)):
                    if done + len(data) > len(buffer):
                        raise TransientError("the response is longer than the requested range")
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    policy.reset()
                if done < len(buffer):
                    raise TransientError("the response is shorter than the requested range")
            except SourceError:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise SourceError(f"{self.path} cannot be read: {type(error).__name__}") from error
                policy.wait(error)

    def check(self) -> None:
        """Do nothing: each response was compared when it arrived."""

    def _request(self, start: int, stop: int) -> Iterator[bytes]:
        url = self._location
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if origin(url) == origin(self.url):
            headers |= self._secret()
        with open_response(url, headers) as response:
            self._check(response, start, stop, url)
            self._location = response.url
            yield from response.body

    def _check(self, response: HTTPResponse, start: int, stop: int, requested_url: str) -> None:
        """Raise TransientError or SourceError unless the body of the response is the requested range."""
        status = response.status
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"the server returned {status}", _seconds(response.headers.get("Retry-After")))
        if status in _EXPIRED_STATUS and (requested_url != self.url or response.redirects):
            self._location = self.url
            raise TransientError(f"the server returned {status}")
        if status in (412, 416):
            raise self._changed()
        if status not in (200, 206):
            hint = "use `hf auth login` with a token that has read access" if status in (401, 403) else ""
            raise SourceError(f"{self.path} cannot be read: the server returned {status}", hint=hint)
        if self._is_changed(response):
            raise self._changed()
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransientError("the response is compressed")
        if status == 200 and (start, stop) != (0, self.size):
            raise TransientError("the server did not send the requested range")
        self._check_extent(response, start, stop)

    def _check_extent(self, response: HTTPResponse, start: int, stop: int) -> None:
        content_range = response.headers.get("Content-Range")
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(content_range or "")
            if match and match[3] not in ("*", str(self.size)):
                raise self._changed()
            if not match or (int(match[1]), int(match[2])) != (start, stop - 1):
                raise TransientError(f"the response is another range ({content_range})")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            if response.status == 200:
                raise self._changed()
            raise TransientError("the response does not have the requested length")

    def _is_changed(self, response: HTTPResponse) -> bool:
        """Whether the response, or a redirect before it, has another etag than the pinned one."""
        if any(etag_of(headers) not in ("", self.etag) for headers in response.redirects if "X-Linked-Etag" in headers):
            return True
        etag = etag_of(response.headers)
        return etag != "" and self._etags.setdefault(origin(response.url), etag) != etag

    def _changed(self) -> SourceError:
        return SourceError(f"{self.path} changed while it was read", hint="run again when nothing writes to it")


@contextmanager
def open_response(url: str, headers: Headers, method: str = "GET") -> Iterator[HTTPResponse]:
    """Send a request and follow redirects; a token in `headers` is sent only to the server of the URL."""
    from huggingface_hub import get_session

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):  # httpx: huggingface_hub 1 and later
        with session.stream(method, url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            redirects = tuple(earlier.headers for earlier in response.history)
            yield HTTPResponse(
                response.status_code, response.headers, redirects, str(response.url), response.iter_raw()
            )
    else:  # requests
        with session.request(
            method, url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=True
        ) as response:
            redirects = tuple(earlier.headers for earlier in response.history)
            body = response.raw.stream(1 << 16, decode_content=False)
            yield HTTPResponse(response.status_code, response.headers, redirects, str(response.url), body)


def etag_of(headers: Headers) -> str:
    """A value that changes with the content: the Hub's etag of the file, the server's etag, or Last-Modified; or ""."""
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or headers.get("Last-Modified") or ""
    return etag.removeprefix("W/").strip('"')


def origin(url: str) -> tuple[str, str]:
    """The scheme and server of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
