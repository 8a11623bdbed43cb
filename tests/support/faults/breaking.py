"""A merge small enough to be broken at every one of its steps, and the tools to break it."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergeforge.errors import OutputError
from mergeforge.execute import executor
from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model
from mergeforge.planner import WORK, Plan, make_plan

SMALL = ModelShape(hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, vocab=64)
RECEIPT = "mergeforge.json"


def merge_command(recipe: Path, out: Path, *options: str) -> list[str]:
    """The command that does a merge in a process of its own."""
    return [sys.executable, "-m", "mergeforge", "run", str(recipe), "--out", str(out), *options]


class World:
    """Inputs in a folder, plans to merge them, and what the result must be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = write_model(root / "base", SMALL, seed=0)
        self.tuned = write_model(root / "tuned", SMALL, seed=1, near=0)
        self.adapter = write_adapter(root / "adapter", SMALL, "base", rank=2, seed=3)
        self._references: dict[str, dict[str, str]] = {}

    def recipe(self, kind: str = "shards") -> dict[str, Any]:
        """`shards`: base and adapter into three files. `single`: two models into one file."""
        if kind == "shards":
            adapters = [{"adapter": str(self.adapter), "weight": 0.5}]
            return {"base_model": str(self.base), "adapters": adapters, "output": {"shard_size": "12KB"}}
        models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (self.base, self.tuned)]
        return {"merge_method": "linear", "models": models}

    def plan(self, out: Path, kind: str = "shards", **options: Any) -> Plan:
        return make_plan(self.recipe(kind), out=out, **{"threads": 1, "memory": "64MiB", **options})

    def command(self, out: Path, kind: str = "shards") -> list[str]:
        """The same as a command of mergeforge."""
        path = self.root / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(self.recipe(kind), sort_keys=False))
        return ["run", str(path), "--out", str(out), "--threads", "1", "--memory", "64MiB", "-q"]

    def reference(self, kind: str = "shards") -> dict[str, str]:
        """The digests of an undisturbed merge. Every merge is called `out`: its card says its name."""
        if kind not in self._references:
            out = self.root / f"reference-{kind}" / "out"
            executor.run_plan(self.plan(out, kind))
            self._references[kind] = digests(out)
        return self._references[kind]


RUN = ("run",)  # what two receipts of the same merge may differ in


def digests(out: Path, apart: Sequence[str] = RUN) -> dict[str, str]:
    """sha256 of every file by name, work folder included; of the receipt without the parts `apart`."""
    return {str(path.relative_to(out)): digest(path, apart) for path in sorted(out.rglob("*")) if path.is_file()}


def digest(path: Path, apart: Sequence[str] = RUN) -> str:
    return digest_of(path.name, path.read_bytes(), apart)


def digest_of(name: str, data: bytes, apart: Sequence[str] = RUN) -> str:
    if name == RECEIPT:
        receipt = json.loads(data)
        for part in apart:
            del receipt[part]
        data = json.dumps(receipt, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def finished_files(out: Path) -> dict[str, str]:
    """The files under their final names."""
    return {name: value for name, value in digests(out).items() if not name.startswith(WORK)} if out.exists() else {}


def assert_nothing_half_done(out: Path, *references: dict[str, str]) -> None:
    """I1: what has its final name is whole. I2: an index, or a receipt, has everything that it names."""
    held = finished_files(out)
    for name, value in held.items():
        assert value in {reference.get(name) for reference in references}, f"{name} is neither whole nor absent"
    for vouching in ("model.safetensors.index.json", RECEIPT):
        if vouching in held:
            reference = next(one for one in references if one.get(vouching) == held[vouching])
            weights = {name: value for name, value in reference.items() if name.endswith(".safetensors")}
            assert weights.items() <= held.items(), f"{vouching} stands there without all that it names"


def go_on(plan: Plan, **options: Any) -> None:
    """The same command again. Killed in its very last steps, the merge was finished and the command says so."""
    try:
        executor.run_plan(plan, **options)
    except OutputError as error:
        assert "already holds a finished merge" in str(error)


Operation = Callable[..., Any]
CHANGING = ("pwrite", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate")


class Strikes:
    """Counts calls, and interferes with one (or, `lasting`, with it and all that follow)."""

    def __init__(self, at: int, action: Operation, lasting: bool) -> None:
        self.at = at
        self.action = action
        self.lasting = lasting
        self.calls: list[str] = []
        self._lock = threading.Lock()

    @property
    def struck(self) -> bool:
        return len(self.calls) >= self.at

    def around(self, original: Operation) -> Operation:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls.append(original.__name__)
                number = len(self.calls)
            if number == self.at or (self.lasting and number > self.at):
                return self.action(original, *arguments, **named)
            return original(*arguments, **named)

        return call
