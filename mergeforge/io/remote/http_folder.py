"""HTTPFolder: a folder on a web server. It cannot be listed, so the usual file names of models are requested."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergeforge.errors import SourceError
from mergeforge.io.remote.http import HTTPRanges, HTTPResponse, etag_of, open_response
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.retry import TransientError, retry
from mergeforge.io.remote.session import RemoteSession

AUX_NAMES = (
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
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
MAX_SMALL_FILE = 256 << 20  # bytes of a file that is read whole
_ABSENT = (403, 404, 410)  # object stores return 403 for a missing file


class HTTPFolder:
    """A folder behind `http://` or `https://`."""

    def __init__(self, url: str, session: RemoteSession) -> None:
        self.url = url
        self.session = session
        self._read: dict[str, bytes | None] = {}

    def names(self, stems: Sequence[str]) -> list[str]:
        indices = [f"{stem}.safetensors.index.json" for stem in stems]
        candidates = [*AUX_NAMES, *indices]
        for name, data in zip(candidates, self.session.pool.map(self._get, candidates), strict=True):
            self._read[name] = data
        existing = [name for name in candidates if self._read[name] is not None]
        return existing + self._weights(stems, [name for name in indices if name in existing])

    def read(self, name: str) -> bytes:
        data = self._read.get(name)
        if data is None:
            raise SourceError(f"{self.url}/{name} does not exist")
        return data

    def open(self, name: str) -> RemoteFile:
        url = f"{self.url}/{name}"

        def request() -> RemoteFile:
            with open_response(url, {"Accept-Encoding": "identity"}, "HEAD") as response:
                length = response.headers.get("Content-Length", "")
                _check_busy(response)
                if response.status != 200 or not length.isdecimal():
                    raise SourceError(f"{url} cannot be read: the server returned {response.status}, length {length!r}")
                ranges = HTTPRanges(url, url, int(length), etag_of(response.headers), location=response.url)
                return RemoteFile(ranges, self.session)

        return retry(url, self.session.stopped, request)

    def _weights(self, stems: Sequence[str], indices: Sequence[str]) -> list[str]:
        """The shards that an index lists, or the single file if there is no index."""
        for name in indices:
            try:
                shards = set(json.loads(self.read(name))["weight_map"].values())
            except (ValueError, TypeError, KeyError, AttributeError):
                raise SourceError(f"{self.url}/{name} is no index of safetensors files") from None
            return sorted(str(shard) for shard in shards)
        return [name for name in (f"{stem}.safetensors" for stem in stems) if self._is_there(name)]

    def _is_there(self, name: str) -> bool:
        url = f"{self.url}/{name}"

        def request() -> bool:
            with open_response(url, {}, "HEAD") as response:
                _check_busy(response)
                return response.status == 200

        return retry(url, self.session.stopped, request)

    def _get(self, name: str) -> bytes | None:
        """A small file; None if it does not exist (or is an HTML error page)."""
        url = f"{self.url}/{name}"

        def get() -> bytes | None:
            with open_response(url, {"Accept-Encoding": "identity"}) as response:
                if response.status in _ABSENT or "html" in response.headers.get("Content-Type", ""):
                    return None
                _check_busy(response)
                if response.status != 200:
                    raise SourceError(f"{url} cannot be read: the server returned {response.status}")
                return _read_body(response, url)

        return retry(url, self.session.stopped, get)


def _check_busy(response: HTTPResponse) -> None:
    if response.status >= 500 or response.status in (408, 429):
        raise TransientError(f"the server returned {response.status}")


def _read_body(response: HTTPResponse, url: str) -> bytes:
    data = bytearray()
    for piece in response.body:
        data += piece
        if len(data) > MAX_SMALL_FILE:
            raise SourceError(f"{url} is too large for a file next to weights")
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and len(data) != int(length):
        raise TransientError("the response is shorter than its Content-Length")
    return bytes(data)
