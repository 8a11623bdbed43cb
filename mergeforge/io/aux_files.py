"""The small files next to a model's weights: existing ones in a folder, and ones that a merge creates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class AuxFile(Protocol):
    """The common interface of a path and an InMemoryFile."""

    def read_bytes(self) -> bytes: ...

    def read_text(self, encoding: str | None = None) -> str: ...


@dataclass(frozen=True)
class InMemoryFile:
    """A file that is not written yet; str() gives its name."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        return self.content

    def read_text(self, encoding: str | None = None) -> str:
        return self.content.decode(encoding or "utf-8")


AuxFiles = Mapping[str, AuxFile]  # by their names in the folder of the model
