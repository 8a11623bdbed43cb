"""The output folder: which one it is, whether it may be written to, and whether its disk has room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, OutputError, RecipeError
from mergeforge.io.disk import DiskFile
from mergeforge.planner.inputs import Inputs
from mergeforge.recipe import Recipe

if TYPE_CHECKING:
    from mergeforge.planner.plan import Plan

WORK = ".mergeforge"  # the folder inside OUT that holds everything unfinished
DISK_SLACK = 64 << 20  # bytes kept free for the files beside the weights


UNNAMED = "merged"  # the folder that a plan without an output folder is made for


def check_output_is_named(recipe: Recipe, out: str | Path | None) -> None:
    """Raise RecipeError if neither `out` nor the recipe names an output folder."""
    if not (out or recipe.output.path):
        raise RecipeError("no output folder is given", hint="give --out DIR, or add output: {path: DIR} to the recipe")


def output_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """The folder to write to: `out`, else the recipe's output.path, else UNNAMED."""
    path = out or recipe.output.path or UNNAMED
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises for an unknown user's home


def check_output_folder(out: Path, inputs: Inputs) -> None:
    """Raise OutputError if OUT is a file, holds files of an input, or lies inside a model's folder."""
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file", hint="name a folder to write to")
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} cannot be used as a folder: {error}") from None
    if out.name.endswith(WORK):
        return  # a hidden work folder, whose files get other names
    target = out.resolve()
    ancestors = [folder for folder in (target, *target.parents) if folder.exists()]
    for checkpoint in inputs.checkpoints:
        parents = {Path(file.path).resolve().parent for file in checkpoint.files if isinstance(file, DiskFile)}
        for source in {checkpoint.folder.resolve(), *parents}:
            if source == target or any(
                source.samefile(folder) and (folder == target or _is_model_folder(folder)) for folder in ancestors
            ):
                text = f"{out} is the input {checkpoint.folder}, or lies inside it"
                raise OutputError(text, hint="write to another folder")


def check_disk(plan: Plan) -> None:
    """Raise BudgetError if the output files do not fit on the disk."""
    folder = existing_folder(plan.out)
    allocated = sum(_allocated(plan.out / WORK / name) for name in plan.files)
    free = shutil.disk_usage(folder).free
    needed = plan.disk - allocated + DISK_SLACK
    if needed > free:
        text = (
            f"the result needs {format_size(needed)} more on the disk of {folder}, which has {format_size(free)} free"
        )
        raise BudgetError(text, hint="free some space, or write elsewhere with --out DIR")


def existing_folder(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _allocated(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()
