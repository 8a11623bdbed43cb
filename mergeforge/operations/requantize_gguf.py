"""A GGUF file in other types, or with other metadata: `mergeforge gguf FILE.gguf`.

The files are written in a hidden folder beside their final places, and moved when all are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.operations.convert_gguf import GGUFConversion, output_paths, plan_conversion, refuse_existing
from mergeforge.planner import Options
from mergeforge.planner.requantize import COPY, Requantization, model_name, plan_requantization


def is_gguf_file(model: str) -> bool:
    """Whether MODEL names a local GGUF file, there or not, and neither a folder nor a repo."""
    return model.endswith(".gguf") and not Path(model).expanduser().is_dir()


def plan_gguf(
    model: str,
    types: Sequence[str],
    out: str | None,
    settings: Mapping[str, Any],
    request: Requantization,
    options: Options,
    *,
    overwrite: bool = False,
) -> GGUFConversion:
    """Plan the GGUF files of a model, which is a folder, a Hub repo or a GGUF file. Raises the errors of both plans."""
    if is_gguf_file(model):
        return plan_gguf_to_gguf(model, types, out, settings, request, options, overwrite=overwrite)
    if request != Requantization():
        text = "requantizing, kept splits and edited metadata are for GGUF files"
        raise RecipeError(f"{text}, but {model} is not one", hint="write the GGUF file first")
    return plan_conversion(model, types or ("q8_0",), out, settings, options, overwrite=overwrite)


def plan_gguf_to_gguf(
    model: str,
    types: Sequence[str],
    out: str | None,
    settings: Mapping[str, Any],
    request: Requantization,
    options: Options,
    *,
    overwrite: bool = False,
) -> GGUFConversion:
    """Plan the GGUF files that a GGUF file becomes; without types, its tensors are copied.

    `settings`: those of plan_conversion(), except `pre`. Raises the same errors.
    """
    path = Path(model).expanduser()
    types = tuple(dict.fromkeys(types)) or (COPY,)
    if settings.get("pre"):
        hint = "--set-metadata tokenizer.ggml.pre=NAME"
        raise RecipeError("--pre is for a model's folder; the GGUF file has its pre-tokenizer", hint=hint)
    if request.keep_split and settings.get("split_max_size"):
        raise RecipeError("--keep-split and --split-max-size exclude each other", hint="leave one of them out")
    name = model_name(path)
    folder, file, work = output_paths(name, types, out, splits=request.keep_split or "split_max_size" in settings)
    plan = plan_requantization(path, settings, types, request, replace(options, out=work))
    conversion = GGUFConversion(plan, folder, file, options)
    if not overwrite and not conversion.is_written:
        refuse_existing(conversion)
    return conversion
