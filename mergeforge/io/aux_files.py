"""The small files beside a model's weights: those that lie in a folder, and those that a merge makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class SideFile(Protocol):
    """What a path and a made file have in common."""

    def read_bytes(self) -> bytes: ...

    def read_text(self, encoding: str | None = None) -> str: ...


@dataclass(frozen=True)
class InMemoryFile:
    """A file that does not lie anywhere yet; prints as its name."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        return self.content

    def read_text(self, encoding: str | None = None) -> str:
        return self.content.decode(encoding or "utf-8")


AuxFiles = Mapping[str, SideFile]  # by their names in the model's folder
