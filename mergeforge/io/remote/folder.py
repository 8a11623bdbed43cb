"""A folder of files behind a URL: on a web server, or in what fsspec knows (s3, gs, az, sftp, memory, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from mergeforge.errors import SourceError
from mergeforge.io.remote.fsspec_folder import FilesystemPlace
from mergeforge.io.remote.http_folder import WebPlace
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.session import RemoteSession


class RemoteFolder(Protocol):
    """What lies behind a URL."""

    def names(self, stems: Sequence[str]) -> list[str]:
        """The names of the files there, as far as a merge may want them."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def open(self, name: str) -> RemoteFile:
        """A file of weights."""


def is_url(path: str) -> bool:
    return "://" in path


def place_of(url: str, link: RemoteSession) -> RemoteFolder:
    """The folder behind a URL. Raises SourceError for one that holds a secret, MissingExtraError without fsspec."""
    parts = urlsplit(url)
    if parts.password or parts.query or parts.fragment:
        text = f"{parts.scheme}://{parts.hostname or ''}{parts.path} has a password or a query in its URL"
        hint = "receipts name their inputs: give credentials in the environment, as the service's own tools take them"
        raise SourceError(text, hint=hint)
    if parts.scheme in ("http", "https"):
        return WebPlace(url.rstrip("/"), link)
    return FilesystemPlace(url.rstrip("/"), link)
