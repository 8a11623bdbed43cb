"""A finished model to GGUF, without a merge: `mergeforge gguf`.

A folder that is empty is written as a merge is. Otherwise the files are written in a hidden folder within it, and get
their names when all of them are complete (operations/add_gguf.py), so that what is there stays as it is until then.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.core.tensor_info import Tile
from mergeforge.errors import OutputError, RecipeError, SourceError, format_list
from mergeforge.execute.executor import run_tiles
from mergeforge.execute.workspace import read_receipt
from mergeforge.operations.add_gguf import Addition, add_files
from mergeforge.planner import WORK, Options, Plan, make_plan

# what may be given beside the types: keys of the recipe's output.gguf entries, `pre` for output.gguf_pre and `mmproj`
SETTINGS = (
    "imatrix",
    "tensor_types",
    "output_tensor_type",
    "token_embedding_type",
    "pure",
    "split_max_size",
    "pre",
    "mmproj",
)


@dataclass(frozen=True)
class GGUFConversion:
    """A planned conversion.

    out: the folder that the files are for. file: the single file that was asked for, or None. options: as given. The
    plan's own folder is `out`, or a hidden folder within it if `out` holds other files.
    """

    plan: Plan
    out: Path
    file: Path | None
    options: Options

    @property
    def files(self) -> list[Path]:
        """The files that the conversion writes."""
        return [self.file] if self.file else [self.out / name for name in self.plan.files]

    @property
    def is_beside(self) -> bool:
        """Whether the files are added to what the folder holds."""
        return self.plan.out != self.out

    @property
    def is_written(self) -> bool:
        """Whether an earlier run has written all files, but was interrupted before they had their names."""
        receipt = read_receipt(self.plan.out) if self.is_beside else None
        if receipt is None or receipt.get("fingerprint") != self.plan.fingerprint:
            return False
        return all(written.exists() or path.exists() for written, path in self.addition.moves.items())

    @property
    def addition(self) -> Addition:
        return Addition(self.plan, self.out, self.file, self.options)


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

    Raises RecipeError, SourceError, BudgetError, and OutputError for files that exist, unless they are to be replaced.
    """
    _refuse_adapters(model)
    name = Path(model.partition("@")[0] if not Path(model).exists() else model).expanduser().absolute().name
    mmproj = settings.get("mmproj")
    files = [*types, *([f"mmproj-{mmproj}"] if mmproj else [])]
    folder, file, work = output_paths(name, files, out, splits=bool(settings.get("split_max_size")))
    if not (file or _holds_files(folder)):
        work = folder
    entry = {key: value for key, value in settings.items() if key not in ("pre", "mmproj")}
    output: dict[str, Any] = {"safetensors": False, "name": name}
    output |= {"gguf": [{"type": type_, **entry} for type_ in types]} if types else {}
    output |= {"gguf_pre": settings["pre"]} if settings.get("pre") else {}
    output |= {"mmproj": mmproj} if mmproj else {}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], "output": output}
    conversion = GGUFConversion(make_plan(recipe, replace(options, out=work)), folder, file, options)
    if not overwrite and conversion.is_beside and not conversion.is_written:
        refuse_existing(conversion)
    return conversion


def output_paths(name: str, types: Sequence[str], out: str | None, *, splits: bool) -> tuple[Path, Path | None, Path]:
    """The folder for the files of the model `name`, the one file that `out` may name, and a hidden folder to work in.

    Raises RecipeError if `out` names one file, but several would be written.
    """
    to_file = out is not None and out.endswith(".gguf")
    if to_file and (len(types) > 1 or splits):
        raise RecipeError(f"{out} names one file, but several would be written", hint="name a folder")
    file = Path(str(out)).expanduser().absolute() if to_file else None
    folder = file.parent if file else Path(out or f"{name}-GGUF").expanduser()
    stem = file.name if file else f"{name}-{'+'.join(sorted(types))}"
    return folder, file, folder / f".{stem}{WORK}"


def convert(conversion: GGUFConversion, *, fresh: bool = False, overwrite: bool = False) -> Iterator[Tile]:
    """Do the conversion, tile by tile; files that are added get their names when all are complete."""
    if fresh or not conversion.is_written:
        yield from run_tiles(conversion.plan, fresh=fresh, overwrite=overwrite or conversion.is_beside)
    if conversion.is_beside:
        add_files(conversion.addition)
        shutil.rmtree(conversion.plan.out, ignore_errors=True)


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds more than an interrupted run."""
    if not folder.is_dir() or ((folder / WORK).exists() and read_receipt(folder) is None):
        return False
    return any(path.name != WORK for path in folder.iterdir())


def refuse_existing(conversion: GGUFConversion) -> None:
    """Raise OutputError if a file of the same name exists, or one that is split otherwise."""
    if existing := [path for path in [*conversion.files, *conversion.addition.superseded] if path.exists()]:
        verb, them = ("exists", "it") if len(existing) == 1 else ("exist", "them")
        hint = f"--overwrite replaces {them} and nothing else"
        raise OutputError(f"{format_list(map(_shown, existing))} {verb}", hint=hint)


def _shown(path: Path) -> str:
    """A path without the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _refuse_adapters(model: str) -> None:
    folder = Path(model).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        hint = "`mergeforge gguf` writes it as a GGUF LoRA; a recipe with adapters and output.gguf folds it"
        raise SourceError(f"{model} is an adapter, not a model", hint=hint)
