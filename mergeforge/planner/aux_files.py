"""The files beside the weights: config.json, tokenizer, chat template, license."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.names import EMBEDDINGS, is_head
from mergeforge.core.tensor_info import DTYPES, TensorInfo
from mergeforge.io.aux_files import AuxFile
from mergeforge.planner.inputs import Inputs, IntermediateModel
from mergeforge.recipe import OUT_DTYPES, Recipe
from mergeforge.tokenizer.output_files import TOKENIZER_FILES, tokenizer_files_in

_OTHERS = (
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*processor_config.json",
    "*_tokenizer_config.json",
)


def config_json(
    recipe: Recipe, base: Mapping[str, Any], tensors: Mapping[str, TensorInfo], tied: bool
) -> dict[str, Any] | None:
    """The output's config: the base's, with dtype, vocab_size and tie_word_embeddings corrected."""
    if not base:
        return None
    config: dict[str, Any] = dict(base)
    config.pop("_name_or_path", None)
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    config[key] = config_dtype(recipe, tensors)
    parts = [config]
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = dict(config["text_config"])
        parts.append(config["text_config"])
        for name in ("dtype", "torch_dtype"):
            if name in config["text_config"]:
                config["text_config"][name] = config[key]
    untied = not tied and any(map(is_head, tensors))
    rows = _embedding_rows(tensors)
    for part in parts:
        if rows and "vocab_size" in part and part["vocab_size"] != rows:
            part["vocab_size"] = rows
        absent_here = part is config and "tie_word_embeddings" not in config
        if untied and (part.get("tie_word_embeddings") or absent_here):
            part["tie_word_embeddings"] = False
    return config


def config_dtype(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> str:
    """The config's dtype: what the recipe asks for, else the dtype of most bytes."""
    asked = recipe.out_dtype or recipe.dtype
    if asked in OUT_DTYPES:
        return str(asked)
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes if info.is_float else 0
    return DTYPES[sizes.most_common(1)[0][0]][1] if sizes else "float32"


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


def _embedding_rows(tensors: Mapping[str, TensorInfo]) -> int:
    """Rows of the input embedding; 0 where none is recognized."""
    rows = {
        info.rows
        for name, info in tensors.items()
        if name.endswith(".weight") and name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS
    }
    return rows.pop() if len(rows) == 1 else 0
