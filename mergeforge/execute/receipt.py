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

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import DoraDelta, LoraDelta, WeightDelta
from mergeforge.adapters.expert_deltas import ExpertLoraDelta, RowRangeDelta
from mergeforge.adapters.peft_delta import PeftDelta
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.core.checksums import file_sha256, tensor_checksum
from mergeforge.execute.change_stats import ChangeStats, total
from mergeforge.execute.journal import Journal
from mergeforge.planner import Plan, TensorPlan
from mergeforge.writers.encoder import ByteRange, TensorEncoder, chunk_ranges, coalesce_ranges
from mergeforge.writers.fp8 import FP8Encoder
from mergeforge.writers.safetensors import SafetensorsEncoder

FORMAT = 1


def receipt(plan: Plan, journal: Journal, sides: Mapping[str, bytes | Path], seconds: float) -> bytes:
    """mergeforge.json as bytes. The `run` part differs from run to run; the rest does not."""
    tensors = {piece.info.name: _tensor(plan, piece, journal) for piece in plan.tensor_plans}
    files: dict[str, Any] = {
        name: {
            "size": file.nbytes,
            "header_size": len(file.header),
            "header_sha256": hashlib.sha256(file.header).hexdigest(),
            "known": [[at, len(data), hashlib.sha256(data).hexdigest()] for at, data in file.known.items()],
        }
        for name, file in plan.files.items()
    }
    for gguf in plan.ggufs:
        for name in gguf.layout.files:
            files[name]["type"] = gguf.file_type.label
    files |= {name: _side_file(content) for name, content in sides.items()}
    revision = plan.recipe.output.publish.revision if plan.recipe.output.publish else ""
    for name, sent in journal.sent.items() if plan.streams else ():
        files[name] |= {"sent_to": {"repo": sent.repo, "revision": revision}, "lfs_sha256": sent.sha256}
    value = {
        "format": FORMAT,
        "mergeforge": version("mergeforge"),
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.documents if plan.recipe.stages else plan.recipe.raw,
        "inputs": [_input(table) for table in plan.inputs.checkpoints],
        "notes": list(plan.notes),
        "checksum": "xxh3-128 of the xxh3-128 digests of the tensor's strips (mergeforge/core/checksums.py)",
        "tensors": dict(sorted(tensors.items())),
        "files": files,
        "run": _run(plan, seconds),
    }
    return (json.dumps(value, indent=1, default=str) + "\n").encode()


def _tensor(plan: Plan, piece: TensorPlan, journal: Journal) -> dict[str, Any]:
    """What was done to a tensor, and where each format holds it."""
    held = [journal.is_finished(tile, piece.chunk_rows) or {} for tile in piece.tiles]
    facts: dict[str, Any] = {
        "action": plan.summaries[piece.info.name],
        "dtype": piece.info.dtype,
        "shape": list(piece.info.shape),
    }
    if isinstance(piece.tensor, AdaptedTensor):
        facts["terms"] = [_term(weight, edit) for weight, edit in piece.tensor.terms]
    if measured := journal.measured(piece.info.name):
        facts["change"] = total(ChangeStats(*one) for one in measured).facts  # type: ignore[arg-type]  # numbers
    for outlet in piece.encoders:
        checksum = tensor_checksum(one for sums in held for one in sums.get(outlet.key, ()))
        if isinstance(outlet, SafetensorsEncoder):
            facts |= {"file": outlet.file, "xxh3": checksum}
        else:
            encoded = {"file": outlet.file, "type": outlet.label, "strips": _strips(outlet, piece), "xxh3": checksum}
            facts.setdefault("fp8" if isinstance(outlet, FP8Encoder) else "gguf", {})[outlet.key] = encoded
    return facts


def _term(weight: float, edit: WeightDelta) -> dict[str, Any]:
    """One adapter's part in a tensor: its kind, weight, and what decides its strength."""
    facts: dict[str, Any] = {"kind": edit.label, "weight": weight}
    low = edit.edit if isinstance(edit, RowRangeDelta) else edit
    low = low.low if isinstance(low, DoraDelta) else low
    if isinstance(low, LoraDelta | ExpertLoraDelta):
        facts |= {"rank": low.rank, "scale": low.scale}
    if isinstance(low, LoraDelta):
        facts["adapter"] = Path(low.left.file.path).parent.name
    if isinstance(low, PeftDelta):
        facts |= low.formula.facts
        facts["adapter"] = Path(next(iter(low.factors.values())).file.path).parent.name
    return facts


def _strips(outlet: TensorEncoder, piece: TensorPlan) -> list[list[list[int]]] | list[int]:
    """Where the strips lie: [offset, bytes, bytes of a strip] if they follow one another, else each one's runs.

    A run is [offset, bytes, times, distance]: so many pieces, so far apart.
    """
    runs = [outlet.byte_ranges(*strip) for strip in chunk_ranges(0, piece.info.rows, outlet)]
    whole = list(coalesce_ranges(run for strip in runs for run in strip))
    sizes = [sum(nbytes for _, nbytes in strip) for strip in runs]
    even = set(sizes[:-1]) <= {sizes[0]} and 0 < sizes[-1] <= sizes[0] if sizes else False
    if len(whole) == 1 and even and all(len(strip) == 1 for strip in runs):
        return [*whole[0], sizes[0]]
    return [_evenly(strip) for strip in runs]


def _evenly(runs: list[ByteRange]) -> list[list[int]]:
    """Runs of one size and distance counted together."""
    found: list[list[int]] = []
    for offset, nbytes in runs:
        last = found[-1] if found else None
        if last and last[1] == nbytes and (last[2] == 1 or offset == last[0] + last[2] * last[3]):
            last[3] = offset - last[0] if last[2] == 1 else last[3]
            last[2] += 1
        else:
            found.append([offset, nbytes, 1, 0])
    return found


def _side_file(content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"size": content.stat().st_size, "sha256": file_sha256(content)}


def _input(table: Checkpoint) -> dict[str, Any]:
    sizes = {Path(file.path).name: file.size for file in table.files}
    files = {name: {"size": sizes.get(name, 0), "header_sha256": digest} for name, digest in table.file_hashes.items()}
    return {"name": table.label, "revision": table.revision, "files": files}


def _run(plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "device": plan.budget.device,
        "threads": plan.budget.threads,
        "memory": plan.budget.memory,
        "peak_rss": _peak(),
        "torch": version("torch"),
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
