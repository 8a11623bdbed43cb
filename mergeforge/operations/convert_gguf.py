"""A finished model to GGUF, without a merge: `mergeforge gguf`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.core.tensor_info import Tile
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.execute.executor import run
from mergeforge.io.disk import on_disk, sync_folder
from mergeforge.planner import WORK, Plan, make_plan


@dataclass(frozen=True)
class Export:
    """A planned conversion. `file`: the one file that is wanted, or None where the folder stays as it is."""

    plan: Plan
    file: Path | None

    @property
    def files(self) -> list[Path]:
        """What there is at the end."""
        return [self.file] if self.file else [self.plan.out / name for name in self.plan.files]


def plan_export(
    model: str, types: Sequence[str], out: str | None, settings: Mapping[str, Any], **options: Any
) -> Export:
    """Plan MODEL's GGUF files of the types; `out` is a folder, or the file if there is one type.

    `settings` are keys of the recipe's output.gguf entries, or output.gguf_pre ("pre"). Raises
    RecipeError, SourceError, BudgetError or OutputError.
    """
    _refuse_adapters(model)
    name = Path(model.partition("@")[0] if not Path(model).exists() else model).expanduser().absolute().name
    to_file = out is not None and out.endswith(".gguf")
    if to_file and (len(types) > 1 or settings.get("split_max_size")):
        raise RecipeError(f"--out {out} names one file, and there would be several", hint="name a folder")
    file = Path(str(out)).expanduser().absolute() if to_file else None
    folder = file.with_name(f".{file.name}.mergeforge") if file else Path(out or f"{name}-GGUF")
    if file and file.exists() and not options.pop("overwrite", False):
        if folder.is_dir() and not (folder / WORK).exists() and not any(folder.glob("*.gguf")):
            shutil.rmtree(folder, ignore_errors=True)  # a run was killed in its last step
        raise OutputError(f"{file} exists", hint="--overwrite replaces it")
    options.pop("overwrite", None)
    settings = dict(settings)
    pre = settings.pop("pre", None)
    output = {"safetensors": False, "gguf": [{"type": one, **settings} for one in types], "name": name}
    output |= {"gguf_pre": pre} if pre else {}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], "output": output}
    return Export(make_plan(recipe, out=folder, **options), file)


def export(export: Export, *, fresh: bool = False, overwrite: bool = False) -> Iterator[Tile]:
    """Carry it out; a single file gets its name when it is whole."""
    yield from run(export.plan, fresh=fresh, overwrite=overwrite or export.file is not None)
    if export.file:
        (written,) = export.plan.files
        with on_disk(export.file):
            os.replace(export.plan.out / written, export.file)
        sync_folder(export.file.parent)
        shutil.rmtree(export.plan.out, ignore_errors=True)


def _refuse_adapters(model: str) -> None:
    folder = Path(model).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        hint = "write a recipe with its base_model, this adapter, and output: {gguf: [...]}; then `mergeforge run`"
        raise SourceError(f"{model} is an adapter, not a model", hint=hint)
