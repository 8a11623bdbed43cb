"""The options of a merge that are not part of its recipe: where it writes, and what it may use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mergeforge.errors import did_you_mean
from mergeforge.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What `mergeforge run` takes beside the recipe; the command line and the Python functions share it.

    out: the output folder, instead of the recipe's output.path. sets: `PATH=VALUE` overrides of recipe keys.
    memory: working memory in bytes, or a size such as "2GiB" (None: 2 GiB, or a quarter of the free memory if that
    is less). device: auto, cpu, cuda, cuda:N or mps. threads: number of workers (None: as many as make sense and fit).
    stream_inputs: read Hub repos in place, without downloading them. stream_to_hub: the Hub repo to which each file is
    uploaded as soon as it is finished. allow_pickle: read `.bin` weights with torch's weights_only loader.
    allow_nonfinite: write infinite and NaN values instead of refusing them. strict: make warnings errors.
    """

    out: str | Path | None = None
    sets: tuple[str, ...] = ()
    memory: str | int | None = None
    device: str = "auto"
    threads: int | None = None
    stream_inputs: bool = False
    stream_to_hub: str | None = None
    allow_pickle: bool = False
    allow_nonfinite: bool = False
    strict: bool = False

    @classmethod
    def of(cls, function: str, keywords: Mapping[str, Any]) -> Options:
        """Options from the keyword arguments of a function. Raises TypeError as changed() does."""
        return Options().changed(function, keywords)

    def changed(self, function: str, keywords: Mapping[str, Any]) -> Options:
        """These options with keyword arguments of a function in place of some.

        Raises TypeError, naming the function, for an unknown argument or an `out` that is not a path.
        """
        names = [field.name for field in fields(self)]
        refuse_unknown(function, keywords, names)
        values = dict(keywords)
        if not isinstance(values.get("out"), str | PathLike | None):
            raise TypeError(f"{function}(): out must be a path, not {type(values['out']).__name__}")
        if "sets" in values:
            values["sets"] = tuple(as_list(function, "sets", values["sets"]))
        return replace(self, **values)

    def overrides(self, recipe: Recipe) -> tuple[str, ...]:
        """`sets`, and the recipe keys that the two streaming options stand for."""
        sets = list(self.sets)
        if self.stream_inputs:
            sets.append("stream_inputs=true")
        if self.stream_to_hub:
            known = recipe.output.publish
            rest = {"private": known.private, "revision": known.revision} if known else {}
            sets.append("output.publish=" + json.dumps({"repo": self.stream_to_hub, "stream": True, **rest}))
        return tuple(sets)


def as_list(function: str, name: str, value: Any) -> list[Any]:
    """An argument that takes several values, of which one may be given alone. Raises TypeError for other types."""
    if isinstance(value, str | PathLike | Mapping):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{function}(): {name} must be a list, not {type(value).__name__}")
    return list(value)


def refuse_unknown(function: str, keywords: Mapping[str, Any], known: list[str]) -> None:
    """Raise TypeError for a keyword argument that a function does not have."""
    for name in keywords:
        if name not in known:
            near = did_you_mean(name, known)
            raise TypeError(f"{function}() has no argument '{name}'" + (f"; {near}" if near else ""))
