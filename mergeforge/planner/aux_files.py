"""The files beside the weights: config.json, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.names import EMBEDDINGS, is_head
from mergeforge.core.tensor_info import DTYPES, TensorInfo
from mergeforge.io.aux_files import SideFile
from mergeforge.planner.inputs import Inputs, IntermediateModel
from mergeforge.recipe import OUT_DTYPES, Recipe

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
)
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
    """The output's config: the base's, with dtype, vocab_size and tie_word_embeddings set right."""
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
    parted = not tied and any(map(is_head, tensors))
    rows = _embedding_rows(tensors)
    for part in parts:
        if rows and "vocab_size" in part and part["vocab_size"] != rows:
            part["vocab_size"] = rows
        absent_here = part is config and "tie_word_embeddings" not in config
        if parted and (part.get("tie_word_embeddings") or absent_here):
            part["tie_word_embeddings"] = False
    return config


def config_dtype(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> str:
    """What the config says: what the recipe asks for, else the dtype of most bytes."""
    asked = recipe.out_dtype or recipe.dtype
    if asked in OUT_DTYPES:
        return str(asked)
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes if info.is_float else 0
    return DTYPES[sizes.most_common(1)[0][0]][1] if sizes else "float32"


def aux_files(inputs: Inputs) -> tuple[dict[str, SideFile], list[str]]:
    """Files to write by name, and notes: the donor's, and an adapter's tokenizer where it changed."""
    donor = inputs.reference_model.checkpoint
    found, notes = (dict(donor.files), []) if isinstance(donor, IntermediateModel) else files_of(donor.folder)
    opened = [*inputs.adapters, *(one for model in [inputs.reference_model] for one in model.adapters)]
    changed = {}
    for one in opened:
        own = {name: one.adapter.folder / name for name in _TOKENIZER if (one.adapter.folder / name).is_file()}
        if any(_differs(path, found.get(name)) for name, path in own.items()):
            changed[one.adapter.label] = own
    if len(changed) == 1:
        label, own = next(iter(changed.items()))
        notes.append(f"tokenizer files come from {label}, which changed them")
        found |= own
    elif changed:
        notes.append(f"{len(changed)} adapters changed the tokenizer, each differently: the base's files are kept")
    return found, notes


def files_of(donor: Path) -> tuple[dict[str, SideFile], list[str]]:
    """What lies beside a model's weights, and notes on what is left out."""
    found: dict[str, SideFile] = {
        path.name: path for pattern in (*_TOKENIZER, *_OTHERS) for path in sorted(donor.glob(pattern)) if path.is_file()
    }
    templates = donor / "additional_chat_templates"
    if templates.is_dir():
        found |= {f"additional_chat_templates/{path.name}": path for path in sorted(templates.glob("*.jinja"))}
    notes = [f"{donor} holds custom code ({path.name}), which is not copied" for path in sorted(donor.glob("*.py"))[:1]]
    return found, notes


def _differs(path: Path, other: SideFile | None) -> bool:
    """JSON files differ by content, others by bytes."""
    if other is None:
        return True
    one, two = path.read_bytes(), other.read_bytes()
    if one == two or path.suffix != ".json":
        return one != two
    try:
        return bool(json.loads(one) != json.loads(two))
    except (ValueError, RecursionError):
        return True


def _embedding_rows(tensors: Mapping[str, TensorInfo]) -> int:
    """Rows of the input embedding; 0 where none is recognised."""
    rows = {
        info.rows
        for name, info in tensors.items()
        if name.endswith(".weight") and name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS
    }
    return rows.pop() if len(rows) == 1 else 0
