"""Registry: name -> extension (merge methods, adapter kinds, ...).

A file in the package is registered by being there: the first lookup imports every module of the package, and each
registers itself with a decorator. These modules import torch only inside functions, so that `mergeforge list` and
recipe errors are fast.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mergeforge.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """The extensions of one kind, found in one package.

    Iterates by name, or in the order of the entries' `order` values. Raises RecipeError for an unknown name, with the
    most similar known one.
    """

    def __init__(self, kind: str, package: str, *, order: Callable[[T], Any] | None = None) -> None:
        self.kind = kind
        self.package = package
        self.order = order
        self._entries: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, entry: T) -> T:
        if name in self._entries:
            raise ValueError(f"duplicate {self.kind} {name!r}")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries) or "known: " + ", ".join(sorted(self._entries))
            raise RecipeError(f"unknown {self.kind} '{name}'", hint=hint)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        self._load()
        order = self.order
        return iter(sorted(self._entries, key=None if order is None else lambda name: order(self._entries[name])))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
