"""A LoRA adapter to GGUF: `mergeforge gguf ADAPTER --base BASE`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.gguf.file_types import file_type_named
from mergeforge.gguf.quantize import encode
from mergeforge.io.disk import WriteBehind, on_disk, sync_folder
from mergeforge.io.file_layout import OutputFile, OutputFiles
from mergeforge.operations.convert_gguf import output_paths
from mergeforge.planner.gguf_adapters import open_with_base
from mergeforge.planner.gguf_lora import GGUFLoraPlan, plan_gguf_lora


@dataclass(frozen=True)
class LoraConversion:
    """A planned LoRA file, and where it goes."""

    plan: GGUFLoraPlan
    path: Path
    label: str


def is_adapter(model: str) -> bool:
    """Whether MODEL is the folder of an adapter, and not of a model."""
    folder = Path(model).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def plan_lora_conversion(
    adapter: str, base: str | None, types: Sequence[str], out: str | None, *, allow_pickle: bool, overwrite: bool
) -> list[LoraConversion]:
    """Plan a GGUF file for each type (f32, f16, bf16, q8_0; by default f32); `base`: None: as the adapter names it.

    Raises RecipeError, SourceError, and OutputError for files that exist.
    """
    types = tuple(dict.fromkeys(types)) or ("f32",)
    opened, base_model = open_with_base(adapter, base, allow_pickle=allow_pickle)
    name = Path(adapter).expanduser().absolute().name.partition("@")[0]
    folder, file, _ = output_paths(name, types, out, splits=False)
    conversions = []
    for type_ in types:
        file_type = file_type_named(type_)
        if file_type.by_llama_quantize:
            raise RecipeError(f"a LoRA has no mixed types such as {file_type.label}", hint="f32, f16, bf16 or q8_0")
        plan = plan_gguf_lora(opened, base_model, name, file_type)
        path = file or folder / plan.file
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists", hint="--overwrite replaces it and nothing else")
        conversions.append(LoraConversion(plan, path, file_type.label))
    return conversions


def convert_lora(
    adapter: str,
    base: str,
    types: Sequence[str],
    out: str | None,
    *,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write an adapter's GGUF files, as plan_lora_conversion() plans them; returns their paths."""
    planned = plan_lora_conversion(adapter, base or None, types, out, allow_pickle=allow_pickle, overwrite=overwrite)
    for conversion in planned:
        write_lora(conversion)
    return [conversion.path for conversion in planned]


def write_lora(conversion: LoraConversion) -> None:
    """Write the file tensor by tensor under another name, then rename it. Raises BudgetError if the disk is full."""
    plan, path = conversion.plan, conversion.path
    with on_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        _write(plan, unfinished, plan.layout.files[plan.file])
        with on_disk(path):
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write(plan: GGUFLoraPlan, path: Path, file: OutputFile) -> None:
    files = OutputFiles(path.parent, {path.name: file})
    files.open()
    try:
        behind = WriteBehind()
        for tensor, output in plan.tensors:
            value = tensor.read()
            if not value.isfinite().all():
                raise SourceError(f"{tensor.name} holds infinite or NaN values", hint="train the adapter again")
            encoded = encode(output.quant_type, value.reshape(-1, value.shape[-1]), None).numpy().reshape(-1)
            files.write(path.name, encoded, plan.layout.extents[tensor.name].offset, behind)
        files.sync()
    finally:
        files.close()
