"""Files of a Hub repo at one commit, opened without being downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.io.remote.http import WebRanges
from mergeforge.io.remote.ranged_file import CHUNK, RemoteFile
from mergeforge.io.remote.retry import Passing, Patience, is_passing
from mergeforge.io.remote.session import RemoteSession

_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_repo_files(repo: str, sha: str, names: Sequence[str], link: RemoteSession) -> dict[str, RemoteFile]:
    """Ask for each file's size, etag and first bytes at the commit `sha`. Raises SourceError, or what the Hub says."""
    ahead = len(names) * CHUNK <= link.kept.nbytes

    def one(name: str) -> RemoteFile:
        file = _opened(repo, sha, name, link)
        if ahead:
            file.read_into(memoryview(bytearray(min(8, file.size))), 0)  # its header comes along, and is kept
        return file

    return dict(zip(names, link.pool.map(one, names), strict=True))


def _opened(repo: str, sha: str, name: str, link: RemoteSession) -> RemoteFile:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    url, path = hf_hub_url(repo, name, revision=sha), f"hf://{repo}@{sha}/{name}"
    facts = _facts(url, path, link)
    if facts.size is None or not facts.etag or facts.commit_hash not in (None, sha):
        raise SourceError(f"the Hub does not tell what {path} is", hint="without --stream-inputs it is downloaded")
    sha256 = facts.etag if _SHA256.fullmatch(facts.etag) else ""
    ranges = WebRanges(
        path, url, facts.size, facts.etag, sha256=sha256, location=facts.location, secret=lambda: build_hf_headers()
    )
    return RemoteFile(ranges, link)


def _facts(url: str, path: str, link: RemoteSession) -> Any:
    """What the Hub tells of a file, asked again while it is busy."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    patience = Patience(path, link.stopped)
    while True:
        try:
            return get_hf_file_metadata(url)
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status < 500 and status not in (408, 429):
                raise
            patience.wait(Passing(f"the Hub says {status}"))
        except Exception as error:
            if not is_passing(error):
                raise
            patience.wait(error)
