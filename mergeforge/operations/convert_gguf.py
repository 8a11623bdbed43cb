"""A finished model to GGUF, without a merge: `mergeforge gguf`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.core.tensor_info import Tile
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.execute.executor import run_tiles
from mergeforge.io.disk import on_disk, sync_folder
from mergeforge.planner import WORK, Options, Plan, make_plan

# what may be given beside the types: keys of the recipe's output.gguf entries, and `pre` for output.gguf_pre
SETTINGS = (
    "imatrix",
    "tensor_types",
    "output_tensor_type",
    "token_embedding_type",
    "pure",
    "split_max_size",
    "pre",
)


@dataclass(frozen=True)
class GGUFConversion:
    """A planned conversion. `file`: the single file that was asked for, or None if the output is a folder."""

    plan: Plan
    file: Path | None

    @property
    def files(self) -> list[Path]:
        """The files that the conversion writes."""
        return [self.file] if self.file else [self.plan.out / name for name in self.plan.files]


def plan_conversion(
    model: str,
    types: Sequence[str],
    out: str | None,
    settings: Mapping[str, Any],
    options: Options,
    *,
    overwrite: bool = False,
) -> GGUFConversion:
    """Plan a model's GGUF files; `out` is a folder, or a file if there is one type. `settings`: see SETTINGS.

    Raises RecipeError, SourceError, BudgetError or OutputError.
    """
    _refuse_adapters(model)
    name = Path(model.partition("@")[0] if not Path(model).exists() else model).expanduser().absolute().name
    to_file = out is not None and out.endswith(".gguf")
    if to_file and (len(types) > 1 or settings.get("split_max_size")):
        raise RecipeError(f"{out} names one file, but several would be written", hint="name a folder")
    file = Path(str(out)).expanduser().absolute() if to_file else None
    folder = file.with_name(f".{file.name}.mergeforge") if file else Path(out or f"{name}-GGUF")
    if file and file.exists() and not overwrite:
        if folder.is_dir() and not (folder / WORK).exists() and not any(folder.glob("*.gguf")):
            shutil.rmtree(folder, ignore_errors=True)  # a run was killed in its last step
        raise OutputError(f"{file} exists", hint="--overwrite replaces it")
    entry = {key: value for key, value in settings.items() if key != "pre"}
    output = {"safetensors": False, "gguf": [{"type": type_, **entry} for type_ in types], "name": name}
    output |= {"gguf_pre": settings["pre"]} if settings.get("pre") else {}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], "output": output}
    return GGUFConversion(make_plan(recipe, replace(options, out=folder)), file)


def convert(conversion: GGUFConversion, *, fresh: bool = False, overwrite: bool = False) -> Iterator[Tile]:
    """Do the conversion, tile by tile; a single file gets its name when it is complete."""
    replaces = overwrite or conversion.file is not None
    yield from run_tiles(conversion.plan, fresh=fresh, overwrite=replaces)
    if conversion.file:
        (written,) = conversion.plan.files
        with on_disk(conversion.file):
            os.replace(conversion.plan.out / written, conversion.file)
        sync_folder(conversion.file.parent)
        shutil.rmtree(conversion.plan.out, ignore_errors=True)


def _refuse_adapters(model: str) -> None:
    folder = Path(model).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        hint = "write a recipe with its base_model, this adapter, and output: {gguf: [...]}; then `mergeforge run`"
        raise SourceError(f"{model} is an adapter, not a model", hint=hint)
