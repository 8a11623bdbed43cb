"""Open an adapter for folding: detect its format, check its configuration, match its tensors to the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.formats import ConvertedAdapter
from mergeforge.adapters.formats.kohya_diffusers import read_kohya_diffusers
from mergeforge.adapters.formats.mlx import MLX_STEM, is_mlx, read_mlx
from mergeforge.adapters.match import Adapter, AdapterMatcher
from mergeforge.adapters.peft.kind import PEFT_METHODS, PeftMethod
from mergeforge.adapters.peft.lora_config import LoraSettings, plain_settings, read_settings
from mergeforge.adapters.peft.unsupported import UNSUPPORTED
from mergeforge.checkpoints.checkpoint import NO_FILES, Checkpoint, open_checkpoint, read_json
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import MALFORMED_ERRORS, SourceError, malformed_as_source_error
from mergeforge.io.disk import InputFile
from mergeforge.io.safetensors_header import parse_header

__all__ = ["Adapter", "open_adapter"]
_CONFIG = "adapter_config.json"


def open_adapter(
    path: Path,
    label: str,
    base: ModelSource,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    base_is_residual: bool = False,
    base_is_stacked: bool = False,
    files: Mapping[str, InputFile] = NO_FILES,
) -> Adapter:
    """Read an adapter's headers and match every tensor to the base.

    `path`: a folder of PEFT or mlx-lm, or a single file (kohya, LyCORIS, diffusers). `base_is_residual`: the base
    is already what the adapter's initialization (PiSSA and others) left of the original. `base_is_stacked`: the
    base already has the layers of the adapter's layer_replication. `files`: weights that are not in the folder.
    Raises SourceError if its type or configuration cannot be folded, or a tensor does not match the base.
    """
    folder = path.parent if path.is_file() else path
    weights = path if path.is_dir() or path.stem not in ("adapter_model", MLX_STEM) else folder
    config = read_json(folder / _CONFIG) if weights.is_dir() and (folder / _CONFIG).exists() else None

    def open_weights(stem: str) -> Checkpoint:
        return open_checkpoint(weights, label, revision=revision, allow_pickle=allow_pickle, stem=stem, files=files)

    if config is not None and is_mlx(config):
        checkpoint = open_weights(MLX_STEM)
        return _match_converted(checkpoint, read_mlx(checkpoint.tensors, config, label), label, base, folder)
    if config is None and weights.is_dir() and _is_model(weights):
        hint = "list it under 'models'; `mergeforge extract-lora` makes an adapter from a model and its base"
        raise SourceError(f"{label} is a whole model, not an adapter", hint=hint)
    if config is None and (weights.is_file() or _is_single_file(weights, files)):
        checkpoint = open_weights("adapter_model")
        return _match_converted(
            checkpoint,
            read_kohya_diffusers(checkpoint.tensors, _metadata(checkpoint), label, base),
            label,
            base,
            folder,
        )
    if config is None:
        raise SourceError(f"{folder / _CONFIG} does not exist", hint="is this an adapter's folder?")
    settings, method = _read_config(config, label, base_is_residual, base_is_stacked)
    checkpoint = open_weights("adapter_model")
    with malformed_as_source_error(folder / _CONFIG):
        return AdapterMatcher(label, base, checkpoint, settings, method, config).match(folder, revision)


def _read_config(
    config: Mapping[str, Any], label: str, residual: bool, stacked: bool
) -> tuple[LoraSettings, PeftMethod | None]:
    """Read PEFT's configuration. Raises SourceError if the adapter cannot be folded."""
    name = str(config.get("peft_type") or "").upper()
    if name in UNSUPPORTED:
        raise SourceError(f"{label}: {name} adapters cannot be merged: {UNSUPPORTED[name]}")
    if name != "LORA" and name not in PEFT_METHODS:
        hint = "known: LORA, " + ", ".join(PEFT_METHODS)
        kind = f"peft_type {name}" if name else "an adapter_config.json without a peft_type"
        raise SourceError(f"{label}: {kind} is not supported by this version", hint=hint)
    method = None if name == "LORA" else PEFT_METHODS[name]
    try:
        if method:
            method.check(config)
        settings = (
            plain_settings(config)
            if method
            else read_settings(config, base_is_residual=residual, base_is_stacked=stacked)
        )
    except MALFORMED_ERRORS as error:
        raise SourceError(f"{label}: {error}") from None
    return settings, method


def _match_converted(
    checkpoint: Checkpoint, converted: ConvertedAdapter, label: str, base: ModelSource, folder: Path
) -> Adapter:
    renamed = replace(checkpoint, tensors=converted.tensors, warnings=(*checkpoint.warnings, *converted.notes))
    matcher = AdapterMatcher(
        label, base, renamed, converted.settings, converted.method, converted.config, converted.aliases
    )
    return matcher.match(folder, checkpoint.revision)


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model: a config.json, and weights under a model's names."""
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def _is_single_file(folder: Path, files: Mapping[str, InputFile]) -> bool:
    """Whether a folder contains exactly one safetensors file, under another name than PEFT's."""
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    names = [name for name in entries | files.keys() if name.endswith(".safetensors")]
    return len(names) == 1 and names[0] != "adapter_model.safetensors"


def _metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
    files = {tensor.file.path: tensor.file for tensor in checkpoint.tensors.values()}
    path, file = next(iter(files.items()), ("", None))
    return parse_header(file).metadata if len(files) == 1 and file and path.endswith(".safetensors") else {}
