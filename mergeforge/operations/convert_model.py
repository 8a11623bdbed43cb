"""A GGUF file as a Hugging Face folder: `mergeforge convert`, a merge of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.planner.gguf_source import model_name


def conversion_recipe(file: str, dtype: str | None = None, shard_size: str | None = None) -> dict[str, Any]:
    """The recipe that writes the model in a GGUF file as safetensors. Raises RecipeError if `file` names no GGUF file.

    dtype: of all tensors; by default F32, F16 and BF16 stay, and quantized tensors become float16.
    """
    if not file.endswith(".gguf"):
        hint = "`mergeforge gguf` writes a folder as GGUF; a recipe with `dtype` writes it in another dtype"
        raise RecipeError(f"{file} is not a GGUF file", hint=hint)
    output = {"shard_size": shard_size} if shard_size else {}
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": file}], "output": output}
    return recipe | ({"dtype": dtype} if dtype else {})


def default_folder(file: str) -> str:
    """Where a GGUF file is written to: a folder named as the model, without the type, in the current folder."""
    return model_name(Path(file))
