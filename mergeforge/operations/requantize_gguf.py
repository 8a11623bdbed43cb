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
from mergeforge.planner.gguf_source import model_name
from mergeforge.planner.requantize import COPY, Requantization, plan_requantization


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
    """Plan the GGUF files of a model, which is a folder, a Hub repo or a GGUF file.

    types: of a folder or repo q8_0 by default, or none with `mmproj`; a GGUF file is copied if there are none.
    settings, errors: as in plan_conversion(); plan_requantization() has more errors.
    """
    if not is_gguf_file(model):
        if options_used := request.options:
            text = f"{model} is not a GGUF file, and {options_used[0]} is for GGUF files"
            raise RecipeError(text, hint="write the GGUF file first")
        return plan_conversion(
            model, types or (() if settings.get("mmproj") else ("q8_0",)), out, settings, options, overwrite=overwrite
        )
    _check(settings, request)
    path, types = Path(model).expanduser(), tuple(dict.fromkeys(types)) or (COPY,)
    splits = request.keep_split or "split_max_size" in settings
    folder, file, work = output_paths(model_name(path), types, out, splits=splits)
    plan = plan_requantization(path, settings, types, request, replace(options, out=work))
    conversion = GGUFConversion(plan, folder, file, options)
    if not overwrite and not conversion.is_written:
        refuse_existing(conversion)
    return conversion


def _check(settings: Mapping[str, Any], request: Requantization) -> None:
    """Raise RecipeError for options that have no meaning for this GGUF file."""
    if settings.get("mmproj"):
        raise RecipeError("--mmproj is for a model's folder; a GGUF file has no towers", hint="leave it out")
    if settings.get("pre"):
        hint = "--set-metadata tokenizer.ggml.pre=NAME"
        raise RecipeError("--pre is for a model's folder; the GGUF file has its pre-tokenizer", hint=hint)
    if request.keep_split and settings.get("split_max_size"):
        raise RecipeError("--keep-split and --split-max-size exclude each other", hint="leave one of them out")
    if request.base and all(adapter.endswith(".gguf") for adapter, _ in request.adapters):
        raise RecipeError("--base is the base model of a PEFT adapter, but none is given", hint="leave it out")
