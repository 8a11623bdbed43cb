"""What an extraction is, decided from headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.hub import download
from mergeforge.lora.extract.difference import Job, Wanted, plan_jobs
from mergeforge.lora.extract.pairing import Choice, Pair, pair_up
from mergeforge.recipe import OUT_DTYPES, ModelRef
from mergeforge.tensors.budget import Budget, make_budget
from mergeforge.writers.peft_adapter import CARD, CONFIG, WEIGHTS, check_out

REPORT = "extraction.json"
FILES = (WEIGHTS, CONFIG, CARD, REPORT)


@dataclass(frozen=True)
class Extraction:
    """A planned extraction: headers are read and the memory is proved."""

    base: Checkpoint
    tuned: Checkpoint
    base_ref: ModelRef
    out: Path
    overwrite: bool
    jobs: tuple[Job, ...]
    wanted: Wanted
    choice: Choice
    dtype: str
    budget: Budget


def plan_extraction(
    tuned: str,
    base: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    svd: str = "auto",
    embeddings: str = "save",
    save_rest: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Extraction:
    """Pair the tensors of TUNED and BASE (folders, files or Hub repos) and prove the memory.

    `rank`: the most that a module gets; `energy`: the share of |D|^2 that is enough. Raises
    RecipeError, SourceError, BudgetError or OutputError.
    """
    wanted = _wanted(rank, energy, svd)
    choice = _choice(embeddings, save_rest, include, exclude)
    if dtype not in OUT_DTYPES or dtype == "float64":
        raise RecipeError(f"--dtype {dtype}: factors are float32, bfloat16 or float16")
    budget = make_budget(memory, device, threads)
    where = Path(out).expanduser().absolute()
    check_out(where, FILES, overwrite=overwrite)
    base_ref, opened = _opened(base, allow_pickle)
    _, other = _opened(tuned, allow_pickle)
    _check_place(where, (opened, other))
    jobs, budget = plan_jobs(_largest_first(pair_up(opened, other, choice)), wanted, budget)
    return Extraction(opened, other, base_ref, where, overwrite, tuple(jobs), wanted, choice, dtype, budget)


def _wanted(rank: int | None, energy: float | None, svd: str) -> Wanted:
    if rank is None and energy is None:
        raise RecipeError("neither a rank nor an energy is given", hint="--rank 64, or --energy 0.95, or both")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy is a share of the squared difference, above 0 and at most 1, not {energy:g}")
    if svd not in ("auto", "exact", "randomised"):
        raise RecipeError(f"--svd {svd}: auto, exact or randomised")
    if svd == "randomised" and rank is None:
        raise RecipeError("--svd randomised needs a --rank", hint="or --svd exact, which sees every singular value")
    return Wanted(rank, energy, svd)


def _choice(embeddings: str, save_rest: bool, include: Sequence[str], exclude: Sequence[str]) -> Choice:
    if embeddings not in ("lora", "save", "skip"):
        raise RecipeError(f"--embeddings {embeddings}: lora, save or skip")
    return Choice(embeddings, save_rest, tuple(include), tuple(exclude))


def _opened(name: str, allow_pickle: bool) -> tuple[ModelRef, Checkpoint]:
    path, at, revision = name.rpartition("@")
    ref = ModelRef(path, revision) if at and not Path(name).exists() else ModelRef(name)
    where = download.fetch(ref.path, ref.revision, ("model",), allow_pickle=allow_pickle)
    folder = where.path
    if folder.suffix == ".gguf":
        raise SourceError(f"{name} is a GGUF file: quantised", hint="take the model that it was made from")
    if folder.is_dir() and (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise SourceError(f"{name} is an adapter, not a model", hint="merge it first: mergeforge run")
    table = open_checkpoint(folder, name, revision=where.revision, allow_pickle=allow_pickle)
    if packed := [one for one, way in table.tensors.items() if isinstance(way, QuantizedTensor)]:
        text = f"{name} is quantised ({packed[0]}): its difference would be mostly rounding"
        raise SourceError(text, hint="take the 16-bit model")
    return ref, table


def _check_place(out: Path, tables: Sequence[Checkpoint]) -> None:
    """OUT may not be, or replace, what is read."""
    for table in tables:
        folders = {table.folder.resolve(), *(Path(file.path).resolve().parent for file in table.files)}
        if any(folder == out.resolve() or out.resolve() in folder.parents for folder in folders):
            raise OutputError(f"{out} is, or holds, the input {table.label}", hint="write into another folder")


def _largest_first(pairs: Sequence[Pair]) -> list[Pair]:
    """So that no worker starts on a large one when the others are done."""
    return sorted(pairs, key=lambda pair: (-pair.tuned.info.numel, pair.name))
