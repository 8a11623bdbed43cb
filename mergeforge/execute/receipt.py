"""The receipt (mergeforge.json): the inputs, what was done to every tensor, and the checksums of the output."""

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
from mergeforge.core.messages import warnings_in, without_warnings
from mergeforge.execute.change_stats import ChangeStats, total_change
from mergeforge.execute.journal import Journal
from mergeforge.planner import Plan, TensorPlan
from mergeforge.writers.encoder import ByteRange, TensorEncoder, chunk_ranges, coalesce_ranges
from mergeforge.writers.fp8 import FP8Encoder
from mergeforge.writers.safetensors import SafetensorsEncoder

FORMAT = 2  # 2: `change` says lost_to_rounding and elements_sampled


def receipt(plan: Plan, journal: Journal, aux_files: Mapping[str, bytes | Path], seconds: float) -> bytes:
    """The receipt as JSON bytes. Its `run` part differs from run to run; the rest does not.

    `aux_files`: the files next to the weights, as contents or paths.
    """
    tensors = {tensor_plan.info.name: _tensor(plan, tensor_plan, journal) for tensor_plan in plan.tensor_plans}
    files: dict[str, Any] = {
        name: {
            "size": file.nbytes,
            "header_size": len(file.header),
            "header_sha256": hashlib.sha256(file.header).hexdigest(),
            "known": [
                [offset, len(data), hashlib.sha256(data).hexdigest()] for offset, data in file.known_bytes.items()
            ],
        }
        for name, file in plan.files.items()
    }
    for gguf in plan.ggufs:
        for name in gguf.layout.files:
            files[name]["type"] = gguf.file_type.label
    files |= {name: _aux_file(content) for name, content in aux_files.items()}
    revision = plan.recipe.output.publish.revision if plan.recipe.output.publish else ""
    for name, uploaded in journal.uploaded.items() if plan.streams else ():
        files[name] |= {"sent_to": {"repo": uploaded.repo, "revision": revision}, "lfs_sha256": uploaded.sha256}
    value = {
        "format": FORMAT,
        "mergeforge": version("mergeforge"),
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.documents if plan.recipe.stages else plan.recipe.raw,
        "inputs": [_input(checkpoint) for checkpoint in plan.inputs.checkpoints],
        "warnings": list(warnings_in(plan.notes)),
        "notes": list(without_warnings(plan.notes)),
        "checksum": "xxh3-128 of the xxh3-128 digests of the tensor's chunks (mergeforge/core/checksums.py)",
        "tensors": dict(sorted(tensors.items())),
        "files": files,
        "run": _run(plan, seconds),
    }
    return (json.dumps(value, indent=1, default=str) + "\n").encode()


def _tensor(plan: Plan, tensor_plan: TensorPlan, journal: Journal) -> dict[str, Any]:
    """What was done to a tensor, and where it is stored in each format."""
    checksums = [journal.is_finished(tile, tensor_plan.chunk_rows) or {} for tile in tensor_plan.tiles]
    entry: dict[str, Any] = {
        "action": plan.summaries[tensor_plan.info.name],
        "dtype": tensor_plan.info.dtype,
        "shape": list(tensor_plan.info.shape),
    }
    if isinstance(tensor_plan.tensor, AdaptedTensor):
        entry["terms"] = [_term(weight, delta) for weight, delta in tensor_plan.tensor.terms]
    if changes := journal.change_stats(tensor_plan.info.name):
        entry["change"] = total_change(ChangeStats(*change) for change in changes).as_json  # type: ignore[arg-type]  # numbers
    for encoder in tensor_plan.encoders:
        checksum = tensor_checksum(chunk for tile in checksums for chunk in tile.get(encoder.key, ()))
        if isinstance(encoder, SafetensorsEncoder):
            entry |= {"file": encoder.file, "xxh3": checksum}
        else:
            encoded = {
                "file": encoder.file,
                "type": encoder.label,
                "strips": _chunks(encoder, tensor_plan),
                "xxh3": checksum,
            }
            entry.setdefault("fp8" if isinstance(encoder, FP8Encoder) else "gguf", {})[encoder.key] = encoded
    return entry


def _term(weight: float, delta: WeightDelta) -> dict[str, Any]:
    """One adapter's contribution to a tensor: its kind, its weight, and the settings that scale it."""
    entry: dict[str, Any] = {"kind": delta.label, "weight": weight}
    inner = delta.delta if isinstance(delta, RowRangeDelta) else delta
    inner = inner.lora if isinstance(inner, DoraDelta) else inner
    if isinstance(inner, LoraDelta | ExpertLoraDelta):
        entry |= {"rank": inner.rank, "scale": inner.scale}
    if isinstance(inner, LoraDelta):
        entry["adapter"] = Path(inner.left.file.path).parent.name
    if isinstance(inner, PeftDelta):
        entry |= inner.formula.details
        entry["adapter"] = Path(next(iter(inner.factors.values())).file.path).parent.name
    return entry


def _chunks(encoder: TensorEncoder, tensor_plan: TensorPlan) -> list[list[list[int]]] | list[int]:
    """Where the chunks are: [offset, bytes, bytes per chunk] if they are contiguous, otherwise the ranges of each.

    A range is [offset, bytes, count, stride]: `count` ranges of `bytes`, `stride` apart.
    """
    ranges = [encoder.byte_ranges(*chunk) for chunk in chunk_ranges(0, tensor_plan.info.rows, encoder)]
    whole = list(coalesce_ranges(byte_range for chunk in ranges for byte_range in chunk))
    sizes = [sum(nbytes for _, nbytes in chunk) for chunk in ranges]
    is_even = set(sizes[:-1]) <= {sizes[0]} and 0 < sizes[-1] <= sizes[0] if sizes else False
    if len(whole) == 1 and is_even and all(len(chunk) == 1 for chunk in ranges):
        return [*whole[0], sizes[0]]
    return [_strided(chunk) for chunk in ranges]


def _strided(ranges: list[ByteRange]) -> list[list[int]]:
    """Ranges of equal size and distance, counted together."""
    strided: list[list[int]] = []
    for offset, nbytes in ranges:
        last = strided[-1] if strided else None
        if last and last[1] == nbytes and (last[2] == 1 or offset == last[0] + last[2] * last[3]):
            last[3] = offset - last[0] if last[2] == 1 else last[3]
            last[2] += 1
        else:
            strided.append([offset, nbytes, 1, 0])
    return strided


def _aux_file(content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"size": content.stat().st_size, "sha256": file_sha256(content)}


def _input(checkpoint: Checkpoint) -> dict[str, Any]:
    sizes = {Path(file.path).name: file.size for file in checkpoint.files}
    files = {
        name: {"size": sizes.get(name, 0), "header_sha256": digest} for name, digest in checkpoint.file_hashes.items()
    }
    return {"name": checkpoint.label, "revision": checkpoint.revision, "files": files}


def _run(plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "device": plan.budget.device,
        "threads": plan.budget.threads,
        "memory": plan.budget.memory,
        "peak_rss": peak_rss(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def peak_rss() -> int:
    """This process's peak resident memory. getrusage may report that of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
