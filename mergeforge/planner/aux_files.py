"""The files beside the weights: tokenizer, chat template, license, modules of a sentence-transformers model, code."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.model import ModelSource
from mergeforge.core.messages import WarningText
from mergeforge.errors import format_list
from mergeforge.io.aux_files import AuxFile, AuxFiles
from mergeforge.io.model_files import ModelFiles, model_files
from mergeforge.planner.generation_config import with_eos_of
from mergeforge.planner.inputs import Inputs, IntermediateModel
from mergeforge.planner.sentence_transformers import missing_modules
from mergeforge.tokenizer.output_files import tokenizer_files_in

_BESIDE_A_FILE = ("generation_config.json", "LICENSE*", "NOTICE*", "*processor_config.json", "*_tokenizer_config.json")
_UNMENTIONED = ("README.md", "mergeforge.json", "mergeforge.yml", "mergekit_config.yml", "Modelfile", "report.html")


def aux_files(inputs: Inputs, *, are_written: bool = True) -> tuple[dict[str, AuxFile], list[str]]:
    """Files to write by name, and notes: the reference model's, and an adapter's tokenizer where it differs.

    are_written: whether the output has them; if it is only GGUF, nobody misses a file.
    """
    reference = inputs.reference_model
    if isinstance(reference.checkpoint, IntermediateModel):
        files, notes = dict(reference.checkpoint.files), list[str]()
    else:
        files, notes = files_of(reference.checkpoint)
        notes = [*notes, *_differing_weights(inputs, files)] if are_written else []
    changed = {}
    for adapter in (opened.adapter for opened in (*inputs.adapters, *reference.adapters)):
        own = {**tokenizer_files_in(adapter.folder), **_value_head(adapter.folder)}
        if any(_differs(path, files.get(name)) for name, path in own.items()):
            changed[adapter.label] = own
    if len(changed) == 1:
        label, own = next(iter(changed.items()))
        notes.append(f"tokenizer files come from {label}, which changed them ({format_list(own)})")
        files = with_eos_of({**files, **own}, files, reference.checkpoint.config)
    elif changed:
        text = f"{len(changed)} adapters changed the tokenizer, each differently: the base's files are kept"
        notes.append(WarningText(text))
    return files, notes


def _value_head(folder: Path) -> dict[str, AuxFile]:
    """The value head that LLaMA-Factory saves beside an adapter."""
    return {path.name: path for path in folder.glob("value_head.*") if path.is_file()}


def files_of(model: ModelSource) -> tuple[dict[str, AuxFile], list[str]]:
    """The files beside a model's weights, and notes on what is left out.

    Of the folder around a model that is named as a single file, only files with well-known names belong to it.
    """
    folder = model.folder
    if isinstance(model, Checkpoint) and model.own_files is not None:
        return dict(model.own_files), []
    if isinstance(model, Checkpoint) and model.is_single_file:
        others = {path.name: path for pattern in _BESIDE_A_FILE for path in sorted(folder.glob(pattern))}
        return {**tokenizer_files_in(folder), **{name: path for name, path in others.items() if path.is_file()}}, []
    found = model_files(folder)
    files = {name: folder / name for name in found.copied if name != "config.json"}
    read = model.file_hashes if isinstance(model, Checkpoint) else {}
    return dict(files), [*_left_out(model, found, read), *missing_modules(model.label, files)]


def _left_out(model: ModelSource, found: ModelFiles, read: Container[str]) -> Iterator[str]:
    """A note on the files that are neither read nor copied."""
    for kind, names in found.left_out.items():
        if kind == "weights":
            names = [name for name in names if name not in read and not name.endswith(".index.json")]
        if names := [name for name in names if name not in _UNMENTIONED]:
            yield f"not copied from {model.label}: {format_list(_by_folder(names))} ({kind})"


def _by_folder(names: Iterable[str]) -> list[str]:
    """The names, or the name of the subfolder of those that are in one."""
    parts = (name.partition("/") for name in names)
    return list(dict.fromkeys(first + slash for first, slash, _ in parts))


def _differing_weights(inputs: Inputs, files: AuxFiles) -> Iterator[WarningText]:
    """Warnings about copied files of weights (modules, value heads), which are not merged, where models differ."""
    reference = inputs.reference_model
    for name in (name for name in files if name.endswith((".safetensors", ".bin"))):
        for model in inputs.models:
            path = model.checkpoint.folder / name
            if model is not reference and path.is_file() and _differs(path, files[name]):
                text = f"{name} is not merged: {reference.label}'s is copied, and {model.label} has another one"
                yield WarningText(text)


def _differs(file: AuxFile, other: AuxFile | None) -> bool:
    """Whether two files differ: JSON files by content, others by bytes."""
    if other is None:
        return True
    content, other_content = file.read_bytes(), other.read_bytes()
    if content == other_content or not str(file).endswith(".json"):
        return content != other_content
    try:
        return bool(json.loads(content) != json.loads(other_content))
    except (ValueError, RecursionError):
        return True
