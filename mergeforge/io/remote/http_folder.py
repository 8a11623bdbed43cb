"""A folder on a web server. Such a server lists nothing, so the names that models have are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergeforge.errors import SourceError
from mergeforge.io.remote.http import Answer, WebRanges, answered, etag_of
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.retry import Passing, persist
from mergeforge.io.remote.session import RemoteSession

BESIDE = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
LARGEST = 256 << 20  # of what is read whole
_ABSENT = (403, 404, 410)  # object stores say 403 for what is not there


class WebPlace:
    """A folder behind `http://` or `https://`."""

    def __init__(self, url: str, link: RemoteSession) -> None:
        self.url = url
        self.link = link
        self._read: dict[str, bytes | None] = {}

    def names(self, stems: Sequence[str]) -> list[str]:
        indices = [f"{stem}.safetensors.index.json" for stem in stems]
        asked = [*BESIDE, *indices]
        for name, data in zip(asked, self.link.pool.map(self._get, asked), strict=True):
            self._read[name] = data
        found = [name for name in asked if self._read[name] is not None]
        return found + self._weights(stems, [name for name in indices if name in found])

    def read(self, name: str) -> bytes:
        data = self._read.get(name)
        if data is None:
            raise SourceError(f"{self.url}/{name} is not there")
        return data

    def open(self, name: str) -> RemoteFile:
        url = f"{self.url}/{name}"

        def look() -> RemoteFile:
            with answered(url, {"Accept-Encoding": "identity"}, "HEAD") as answer:
                length = answer.headers.get("Content-Length", "")
                _check_busy(answer)
                if answer.status != 200 or not length.isdecimal():
                    raise SourceError(f"{url} cannot be read: the server says {answer.status}, length {length!r}")
                ranges = WebRanges(url, url, int(length), etag_of(answer.headers), location=answer.url)
                return RemoteFile(ranges, self.link)

        return persist(url, self.link.stopped, look)

    def _weights(self, stems: Sequence[str], indices: Sequence[str]) -> list[str]:
        """The shards that an index names, or the file that there is without one."""
        for name in indices:
            try:
                shards = set(json.loads(self.read(name))["weight_map"].values())
            except (ValueError, TypeError, KeyError, AttributeError):
                raise SourceError(f"{self.url}/{name} is no index of safetensors files") from None
            return sorted(str(one) for one in shards)
        return [name for name in (f"{stem}.safetensors" for stem in stems) if self._is_there(name)]

    def _is_there(self, name: str) -> bool:
        url = f"{self.url}/{name}"

        def look() -> bool:
            with answered(url, {}, "HEAD") as answer:
                _check_busy(answer)
                return answer.status == 200

        return persist(url, self.link.stopped, look)

    def _get(self, name: str) -> bytes | None:
        """A small file, or None where there is none (or a page that says so)."""
        url = f"{self.url}/{name}"

        def get() -> bytes | None:
            with answered(url, {"Accept-Encoding": "identity"}) as answer:
                if answer.status in _ABSENT or "html" in answer.headers.get("Content-Type", ""):
                    return None
                _check_busy(answer)
                if answer.status != 200:
                    raise SourceError(f"{url} cannot be read: the server says {answer.status}")
                return _whole(answer, url)

        return persist(url, self.link.stopped, get)


def _check_busy(answer: Answer) -> None:
    if answer.status >= 500 or answer.status in (408, 429):
        raise Passing(f"the server says {answer.status}")


def _whole(answer: Answer, url: str) -> bytes:
    data = bytearray()
    for piece in answer.body:
        data += piece
        if len(data) > LARGEST:
            raise SourceError(f"{url} is too large to lie beside weights")
    length = answer.headers.get("Content-Length", "")
    if length.isdecimal() and len(data) != int(length):
        raise Passing("the answer is shorter than it says")
    return bytes(data)
