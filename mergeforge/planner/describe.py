"""A plan in words: as a page for people, and as JSON."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.core.messages import without_warnings
from mergeforge.core.sizes import format_size
from mergeforge.gguf.quantize import backend_for
from mergeforge.lora.combine import Combination
from mergeforge.planner.compose import MergeGraph
from mergeforge.planner.output_folder import existing_folder
from mergeforge.planner.process_memory import library_memory, process_memory
from mergeforge.planner.tiling import TensorPlan

if TYPE_CHECKING:
    from mergeforge.planner.plan import Plan


def tensor_summaries(tensor_plans: Iterable[TensorPlan], graph: MergeGraph) -> dict[str, str]:
    """What is done to each output tensor, in words, by its name."""
    return {tensor_plan.info.name: _summary(tensor_plan, graph) for tensor_plan in tensor_plans}


def _summary(tensor_plan: TensorPlan, graph: MergeGraph) -> str:
    tensor, info = tensor_plan.tensor, tensor_plan.info
    untouched = f"dequantized from {tensor.layout.label}" if isinstance(tensor, QuantizedTensor) else "cast"
    summary = graph.summaries.get(info.name, "copied" if tensor_plan.backend.name == "copy" else untouched)
    return summary if tensor.info.dtype == info.dtype else f"{summary}, {tensor.info.dtype} to {info.dtype}"


def plan_page(plan: Plan, *, notes: bool = True, target: str = "") -> str:
    """Inputs, what is done to each group of tensors, bytes, memory, disk and notes, as lines of text.

    `target`: what the files are written to, where it is not the plan's folder.
    """
    target = target or (str(plan.out) if plan.has_output else "(no output folder given)")
    lines = [f"{plan.recipe.method_name} -> {target}", *_inputs(plan), "", *_groups(plan)]
    streamed = f", {format_size(plan.nbytes_streamed)} of it streamed" if plan.nbytes_streamed else ""
    lines += [f"reads    {format_size(plan.nbytes_read)}{streamed}", *_written(plan)]
    lines += _memory(plan)
    free = shutil.disk_usage(existing_folder(plan.out)).free
    if plan.tensor_plans:
        lines.append(f"backend  {_backends(plan)}")
    lines.append(f"disk     {format_size(plan.disk)} needed, {format_size(free)} free")
    return "\n".join(lines + (_messages(plan) if notes else []))


def _messages(plan: Plan) -> list[str]:
    """Warnings, then notes."""
    notes = (*without_warnings(plan.notes), *plan.machine_notes)
    return [*(f"warning  {warning}" for warning in plan.warnings), *(f"note     {note}" for note in notes)]


def plan_as_json(plan: Plan) -> dict[str, object]:
    """The plan as values for JSON: `mergeforge plan --json`."""
    return {
        "merge_method": plan.recipe.method_name,
        "out": str(plan.out) if plan.has_output else None,
        "inputs": [
            {"name": checkpoint.label, "revision": checkpoint.revision, "bytes": checkpoint.nbytes}
            for checkpoint in plan.inputs.checkpoints
        ],
        "bytes_read": plan.nbytes_read,
        "bytes_streamed": plan.nbytes_streamed,
        "bytes_written": plan.nbytes_written,
        "disk": plan.disk,
        "files": {name: file.nbytes for name, file in plan.files.items()},
        "gguf": [
            {"type": gguf.file_type.label, "files": list(gguf.layout.files), "bits_per_weight": gguf.bits_per_weight}
            for gguf in plan.ggufs
        ],
        "peak_memory": plan.peak,
        "process_memory": process_memory(plan),
        "memory": plan.budget.memory,
        "threads": plan.budget.threads,
        "device": plan.budget.device,
        "tensors": {tensor_plan.info.name: _tensor_as_json(plan, tensor_plan) for tensor_plan in plan.tensor_plans},
        "warnings": list(plan.warnings),
        "notes": [*without_warnings(plan.notes), *plan.machine_notes],
        "fingerprint": plan.fingerprint,
    }


def _tensor_as_json(plan: Plan, tensor_plan: TensorPlan) -> Mapping[str, Any]:
    return {
        "action": plan.summaries[tensor_plan.info.name],
        "dtype": tensor_plan.info.dtype,
        "shape": list(tensor_plan.info.shape),
        "backend": tensor_plan.backend.name,
        "tiles": len(tensor_plan.tiles),
    }


def _inputs(plan: Plan) -> list[str]:
    rows = [("input", "tensors", "bytes")]
    for checkpoint in plan.inputs.checkpoints:
        name = f"{checkpoint.label} at {checkpoint.revision[:10]}" if checkpoint.revision else checkpoint.label
        rows.append((name, str(len(checkpoint.tensors)), format_size(checkpoint.nbytes)))
    return _aligned(rows)


def _groups(plan: Plan) -> list[str]:
    """Tensors to which the same is done, as one row."""
    if not plan.tensor_plans:
        return []
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor_plan in plan.tensor_plans:
        summary = plan.summaries[tensor_plan.info.name]
        counts[summary] += 1
        sizes[summary] += tensor_plan.info.nbytes
    rows = [("tensors", "operation", "bytes")]
    rows += [(str(count), summary, format_size(sizes[summary])) for summary, count in counts.most_common()]
    return [*_aligned(rows), ""]


def _memory(plan: Plan) -> list[str]:
    """The memory of the process, and what of it the limit is for."""
    workers = f"{plan.budget.threads} worker{'s' if plan.budget.threads > 1 else ''} on {plan.budget.device}"
    limit = f"{format_size(plan.budget.memory)}{' (the default)' if plan.budget.is_default else ' allowed'}"
    libraries = library_memory(plan)
    total = format_size(plan.peak + libraries)
    return [
        f"memory   at most {total}: {format_size(libraries)} for Python and its libraries,",
        f"         {format_size(plan.peak)} to work in, of {limit}; {workers}",
    ]


def _backends(plan: Plan) -> str:
    """What computes the tensors (planner/backend.py)."""
    counts = Counter(tensor_plan.backend.label for tensor_plan in plan.tensor_plans)
    return "; ".join(f"{count} tensor{'s' if count > 1 else ''} {label}" for label, count in counts.most_common())


def _written(plan: Plan) -> Iterator[str]:
    """What is written, a line for each format."""
    count = len(plan.checkpoint.files)
    if count:
        size, files = format_size(plan.checkpoint.nbytes), f"{count} safetensors file{'s' if count > 1 else ''}"
        yield f"writes   {size} in {files}: {_dtypes(plan)}"
    if plan.streams and (publish := plan.recipe.output.publish):
        yield f"uploads  each file to {publish.repo} when it is finished, and removes it here"
    if plan.combination:
        ranks = sum(module.rank for module in plan.combination.sums)
        truncation = "every rank kept" if plan.combination.exact else f"truncated to {_truncation(plan.combination)}"
        yield f"writes   one adapter: {len(plan.combination.sums)} modules, {ranks} ranks in all, {truncation}"
    for gguf in plan.ggufs:
        sizes = sorted(gguf.nbytes_by_type.items(), key=lambda item: -item[1])
        types = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in sizes)
        size, bits = format_size(gguf.layout.nbytes), f"{gguf.bits_per_weight:.2f} bits per weight"
        yield f"writes   {size} in {gguf.first_file}: {bits} ({types})"
    if plan.ggufs:
        yield f"         encoded by {_backend(plan)} from {plan.recipe.output.gguf_from} values"


def _backend(plan: Plan) -> str:
    """What encodes the GGUF tensors; with the types that only the C library encodes, if it is not what encodes all."""
    backend = backend_for(plan.budget.device)
    types = {tensor.quant_type for gguf in plan.ggufs for tensor in gguf.tensors}
    others = sorted(kind.name for kind in types if kind.can_encode and kind.quantize_torch is None)
    return f"torch, {', '.join(others)} by the C library on the CPU," if others and backend == "torch" else backend


def _dtypes(plan: Plan) -> str:
    """The dtypes of the safetensors files; with their bytes if there are several."""
    sizes: Counter[str] = Counter()
    for info in plan.tensors:
        sizes[info.dtype] += info.nbytes
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{dtype} {format_size(nbytes)}" for dtype, nbytes in sizes.most_common())


def _truncation(combination: Combination) -> str:
    rank = [f"rank {combination.rank}"] if combination.rank else []
    energy = [f"{combination.energy:.4g} of the energy"] if combination.energy else []
    return " and ".join(rank + energy)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
