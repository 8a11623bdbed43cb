"""The files beside the weights: tokenizer, chat template, license."""

from __future__ import annotations

import json
from pathlib import Path

from mergeforge.io.aux_files import AuxFile
from mergeforge.planner.inputs import Inputs, IntermediateModel
from mergeforge.tokenizer.output_files import TOKENIZER_FILES, tokenizer_files_in

_OTHERS = (
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*processor_config.json",
    "*_tokenizer_config.json",
)


def aux_files(inputs: Inputs) -> tuple[dict[str, AuxFile], list[str]]:
    """Files to write by name, and notes: the reference model's, and an adapter's tokenizer where it differs."""
    reference = inputs.reference_model
    if isinstance(reference.checkpoint, IntermediateModel):
        files, notes = dict(reference.checkpoint.files), list[str]()
    else:
        files, notes = files_of(reference.checkpoint.folder)
    changed = {}
    for adapter in (opened.adapter for opened in (*inputs.adapters, *reference.adapters)):
        own = {name: adapter.folder / name for name in TOKENIZER_FILES if (adapter.folder / name).is_file()}
        if any(_differs(path, files.get(name)) for name, path in own.items()):
            changed[adapter.label] = own
    if len(changed) == 1:
        label, own = next(iter(changed.items()))
        notes.append(f"tokenizer files come from {label}, which changed them")
        files |= own
    elif changed:
        notes.append(f"{len(changed)} adapters changed the tokenizer, each differently: the base's files are kept")
    return files, notes


def files_of(folder: Path) -> tuple[dict[str, AuxFile], list[str]]:
    """The files beside a model's weights, and notes on what is left out."""
    others = {path.name: path for pattern in _OTHERS for path in sorted(folder.glob(pattern)) if path.is_file()}
    files: dict[str, AuxFile] = {**tokenizer_files_in(folder), **others}
    notes = [f"{folder} has custom code ({path.name}), which is not copied" for path in sorted(folder.glob("*.py"))[:1]]
    return files, notes


def _differs(path: Path, other: AuxFile | None) -> bool:
    """Whether two files differ: JSON files by content, others by bytes."""
    if other is None:
        return True
    content, other_content = path.read_bytes(), other.read_bytes()
    if content == other_content or path.suffix != ".json":
        return content != other_content
    try:
        return bool(json.loads(content) != json.loads(other_content))
    except (ValueError, RecursionError):
        return True
