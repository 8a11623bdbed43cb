"""Open the files of a Hub repo at one commit without downloading them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.io.remote.http import HTTPRanges
from mergeforge.io.remote.ranged_file import CHUNK_NBYTES, RemoteFile
from mergeforge.io.remote.retry import RetryPolicy, TransientError, is_transient
from mergeforge.io.remote.session import RemoteSession

_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_repo_files(repo: str, sha: str, names: Sequence[str], session: RemoteSession) -> dict[str, RemoteFile]:
    """Request the size, etag and first bytes of each file at the commit `sha`.

    Raises SourceError or an exception of huggingface_hub.
    """
    prefetch = len(names) * CHUNK_NBYTES <= session.cache.nbytes

    def open_file(name: str) -> RemoteFile:
        file = _open_file(repo, sha, name, session)
        if prefetch:
            file.read_into(
                memoryview(bytearray(min(8, file.size))), 0
            )  # caches the first chunk, which holds the header
        return file

    return dict(zip(names, session.pool.map(open_file, names), strict=True))


def _open_file(repo: str, sha: str, name: str, link: RemoteSession) -> RemoteFile:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    url, path = hf_hub_url(repo, name, revision=sha), f"hf://{repo}@{sha}/{name}"
    metadata = _metadata(url, path, link)
    if metadata.size is None or not metadata.etag or metadata.commit_hash not in (None, sha):
        raise SourceError(f"the Hub gives no size or etag for {path}", hint="without --stream-inputs it is downloaded")
    sha256 = metadata.etag if _SHA256.fullmatch(metadata.etag) else ""
    ranges = HTTPRanges(
        path,
        url,
        metadata.size,
        metadata.etag,
        sha256=sha256,
        location=metadata.location,
        secret=lambda: build_hf_headers(),
    )
    return RemoteFile(ranges, link)


def _metadata(url: str, path: str, link: RemoteSession) -> Any:
    """The Hub's metadata of a file; retried while the Hub is busy."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    policy = RetryPolicy(path, link.stopped)
    while True:
        try:
            return get_hf_file_metadata(url)
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status < 500 and status not in (408, 429):
                raise
            policy.wait(TransientError(f"the Hub returned {status}"))
        except Exception as error:
            if not is_transient(error):
                raise
            policy.wait(error)
