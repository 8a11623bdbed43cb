"""The receipt: what went in, what was done to every tensor, and the checksum of what came out."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergeforge.checksums import tensor_checksum
from mergeforge.journal import Journal
from mergeforge.planning import Plan
from mergeforge.sources.checkpoint import Checkpoint

FORMAT = 1


def receipt(plan: Plan, journal: Journal, sides: Mapping[str, bytes | Path], seconds: float) -> bytes:
    """mergeforge.json as bytes. The `run` part differs from run to run; the rest does not."""
    tensors = {}
    for piece in plan.pieces:
        sums = [one for tile in piece.tiles for one in journal.held(tile, piece.info.block_rows) or ()]
        tensors[piece.info.name] = {
            "action": plan.actions[piece.info.name],
            "dtype": piece.info.dtype,
            "shape": list(piece.info.shape),
            "file": plan.layout.extents[piece.info.name].file,
            "xxh3": tensor_checksum(sums),
        }
    files: dict[str, Any] = {
        name: {"size": file.nbytes, "header_sha256": hashlib.sha256(file.header).hexdigest()}
        for name, file in plan.layout.files.items()
    }
    files |= {name: _side_file(content) for name, content in sides.items()}
    value = {
        "format": FORMAT,
        "mergeforge": version("mergeforge"),
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.raw,
        "inputs": [_input(table) for table in plan.inputs.checkpoints],
        "notes": list(plan.notes),
        "checksum": "xxh3-128 of the xxh3-128 digests of the tensor's blocks (mergeforge/checksums.py)",
        "tensors": dict(sorted(tensors.items())),
        "files": files,
        "run": _run(plan, seconds),
    }
    return (json.dumps(value, indent=1, default=str) + "\n").encode()


def _side_file(content: bytes | Path) -> dict[str, Any]:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _input(table: Checkpoint) -> dict[str, Any]:
    sizes = {Path(stored.file.path).name: stored.file.size for stored in table.tensors.values()}
    files = {name: {"size": sizes.get(name, 0), "header_sha256": digest} for name, digest in table.file_hashes.items()}
    return {"name": table.label, "revision": table.revision, "files": files}


def _run(plan: Plan, seconds: float) -> dict[str, Any]:
    import torch

    return {
        "seconds": round(seconds, 3),
        "device": plan.budget.device,
        "threads": plan.budget.threads,
        "memory": plan.budget.memory,
        "peak_rss": _peak(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _peak() -> int:
    """This process's peak resident memory. (getrusage counts the memory of the process that started it, too.)"""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
