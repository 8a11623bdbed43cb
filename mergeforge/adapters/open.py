"""An adapter, ready to fold: its dialect, kind and configuration are checked, its tensors matched to the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.formats import Translated
from mergeforge.adapters.formats.kohya_diffusers import read_diffusion
from mergeforge.adapters.formats.mlx import STEM, is_mlx, read_mlx
from mergeforge.adapters.match import Adapter, Matching
from mergeforge.adapters.peft.kind import KINDS, Kind
from mergeforge.adapters.peft.lora_config import LoraSettings, plain_settings, read_settings
from mergeforge.adapters.peft.unsupported import REFUSED
from mergeforge.checkpoints.checkpoint import NOTHING, Checkpoint, ModelSource, open_checkpoint, read_json
from mergeforge.errors import ODD, SourceError, refused_if_odd
from mergeforge.io.disk import InputFile
from mergeforge.io.safetensors_header import header_of

__all__ = ["Adapter", "open_adapter"]
_CONFIG = "adapter_config.json"


def open_adapter(
    path: Path,
    label: str,
    base: ModelSource,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    residual: bool = False,
    stacked: bool = False,
    files: Mapping[str, InputFile] = NOTHING,
) -> Adapter:
    """Read an adapter's headers and match every tensor to the base.

    `path`: a folder of PEFT or mlx-lm, or a single file (kohya, LyCORIS, diffusers). `residual`: the base
    is what the adapter's start (PiSSA and the like) left of the original; `stacked`: its layers are those of the
    adapter's layer_replication. `files`: weights of the folder that lie elsewhere.
    Raises SourceError when its kind or configuration cannot be folded, or a tensor matches nothing.
    """
    folder = path.parent if path.is_file() else path
    ours = path if path.is_dir() or path.stem not in ("adapter_model", STEM) else folder
    config = read_json(folder / _CONFIG) if ours.is_dir() and (folder / _CONFIG).exists() else None

    def table(stem: str) -> Checkpoint:
        return open_checkpoint(ours, label, revision=revision, allow_pickle=allow_pickle, stem=stem, files=files)

    if config is not None and is_mlx(config):
        found = table(STEM)
        return _matched(found, read_mlx(found.tensors, config, label), label, base, folder)
    if config is None and (ours.is_file() or _is_single(ours, files)):
        found = table("adapter_model")
        return _matched(found, read_diffusion(found.tensors, _metadata(found), label, base), label, base, folder)
    if config is None:
        raise SourceError(f"{folder / _CONFIG} does not exist", hint="is it the adapter's folder?")
    settings, kind = _read_config(config, label, residual, stacked)
    found = table("adapter_model")
    with refused_if_odd(folder / _CONFIG):
        return Matching(label, base, found, settings, kind, config).adapter(folder, revision)


def _read_config(
    config: Mapping[str, Any], label: str, residual: bool, stacked: bool
) -> tuple[LoraSettings, Kind | None]:
    """What PEFT's configuration says. Raises SourceError where it cannot be folded."""
    name = str(config.get("peft_type", "")).upper()
    if name in REFUSED:
        raise SourceError(f"{label}: {name} adapters cannot be merged here: {REFUSED[name]}")
    if name != "LORA" and name not in KINDS:
        hint = "known: LORA, " + ", ".join(KINDS)
        raise SourceError(f"{label}: adapters of type {name or 'unknown'} cannot be merged by this version", hint=hint)
    kind = None if name == "LORA" else KINDS[name]
    try:
        if kind:
            kind.check(config)
        settings = plain_settings(config) if kind else read_settings(config, residual=residual, stacked=stacked)
    except ODD as error:
        raise SourceError(f"{label}: {error}") from None
    return settings, kind


def _matched(table: Checkpoint, translated: Translated, label: str, base: ModelSource, folder: Path) -> Adapter:
    known = replace(table, tensors=translated.tensors, warnings=(*table.warnings, *translated.notes))
    matching = Matching(label, base, known, translated.settings, translated.kind, translated.config)
    return matching.adapter(folder, table.revision)


def _is_single(folder: Path, files: Mapping[str, InputFile]) -> bool:
    """Whether a folder holds one safetensors file, and not under PEFT's name."""
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    names = [name for name in held | files.keys() if name.endswith(".safetensors")]
    return len(names) == 1 and names[0] != "adapter_model.safetensors"


def _metadata(table: Checkpoint) -> Mapping[str, str]:
    files = {one.file.path: one.file for one in table.tensors.values()}
    path, file = next(iter(files.items()), ("", None))
    return header_of(file).metadata if len(files) == 1 and file and path.endswith(".safetensors") else {}
