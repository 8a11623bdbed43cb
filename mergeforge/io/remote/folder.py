"""RemoteFolder: a folder behind a URL, on a web server or in any file system of fsspec (s3, gs, az, sftp, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from mergeforge.errors import SourceError
from mergeforge.io.remote.fsspec_folder import FsspecFolder
from mergeforge.io.remote.http_folder import HTTPFolder
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.session import RemoteSession


class RemoteFolder(Protocol):
    """A folder behind a URL."""

    def names(self, stems: Sequence[str]) -> list[str]:
        """The names of the files that a merge may need."""

    def read(self, name: str) -> bytes:
        """Read a small file."""

    def open(self, name: str) -> RemoteFile:
        """Open a weight file."""


def is_url(path: str) -> bool:
    return "://" in path


def open_remote_folder(url: str, session: RemoteSession) -> RemoteFolder:
    """Open the folder behind a URL.

    Raises SourceError for a URL that contains a secret, MissingExtraError if fsspec is needed and missing.
    """
    parts = urlsplit(url)
    if parts.password or parts.query or parts.fragment:
        text = f"{parts.scheme}://{parts.hostname or ''}{parts.path} has a password or a query in its URL"
        hint = "receipts record the URLs of inputs; pass credentials in the environment, as for the service's own tools"
        raise SourceError(text, hint=hint)
    if parts.scheme in ("http", "https"):
        return HTTPFolder(url.rstrip("/"), session)
    return FsspecFolder(url.rstrip("/"), session)
