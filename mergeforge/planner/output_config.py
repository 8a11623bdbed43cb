"""The config.json of a merge's output: the base's, corrected where the weights differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mergeforge.checkpoints.names import EMBEDDINGS
from mergeforge.checkpoints.ties import ModelTies
from mergeforge.core.tensor_info import DTYPES, TensorInfo
from mergeforge.recipe import OUT_DTYPES, Recipe


def config_json(
    recipe: Recipe, base: Mapping[str, Any], tensors: Mapping[str, TensorInfo], ties: ModelTies, *, untied: bool
) -> dict[str, Any] | None:
    """The output's config: the base's, with dtype and vocab_size corrected; `untied`: nothing is tied any more."""
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
    rows = _embedding_rows(tensors, ties)
    head_rows = tensors[ties.head].rows if ties.head in tensors else rows  # Mllama's embedding has 8 rows more
    for part in parts:
        if rows and "vocab_size" in part and part["vocab_size"] not in (rows, head_rows):
            if part.get("decoder_vocab_size") == part["vocab_size"]:
                part["decoder_vocab_size"] = rows
            part["vocab_size"] = rows
        if untied and part.get("tie_word_embeddings") is not False:
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


def _embedding_rows(tensors: Mapping[str, TensorInfo], ties: ModelTies) -> int:
    """Rows of the input embedding; 0 where none is recognized."""
    tie = ties.of(ties.embedding)
    if known := next((name for name in (ties.embedding, *(tie.stored if tie else ())) if name in tensors), ""):
        return tensors[known].rows
    rows = {info.rows for name, info in tensors.items() if name.endswith(".weight") and _is_embedding(name)}
    return rows.pop() if len(rows) == 1 else 0


def _is_embedding(name: str) -> bool:
    return name.split(".")[-2:-1] != [] and name.split(".")[-2] in EMBEDDINGS
