"""Plan an extraction from headers: the tensor pairs, the method and the memory of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.core.file_names import MODEL_CARD
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.hub import download
from mergeforge.lora.extract.difference import PairTask, RankTarget, plan_tasks
from mergeforge.lora.extract.pairing import TensorFilter, TensorPair, pair_tensors
from mergeforge.recipe import OUT_DTYPES, ModelRef
from mergeforge.tensors.budget import Budget, make_budget
from mergeforge.writers.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder

REPORT = "extraction.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MODEL_CARD, REPORT)


@dataclass(frozen=True)
class Extraction:
    """A planned extraction. The headers have been read and the memory is proved."""

    base: Checkpoint
    tuned: Checkpoint
    base_ref: ModelRef
    out: Path
    overwrite: bool
    tasks: tuple[PairTask, ...]
    target: RankTarget
    filter: TensorFilter
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

    `rank`: the maximum rank of a module; `energy`: the fraction of |D|^2 that the factors have to keep. Raises
    RecipeError, SourceError, BudgetError or OutputError.
    """
    target = _rank_target(rank, energy, svd)
    tensor_filter = _tensor_filter(embeddings, save_rest, include, exclude)
    if dtype not in OUT_DTYPES or dtype == "float64":
        raise RecipeError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    budget = make_budget(memory, device, threads)
    out_folder = Path(out).expanduser().absolute()
    check_adapter_folder(out_folder, FILES, overwrite=overwrite)
    base_ref, base_model = _open(base, allow_pickle)
    _, tuned_model = _open(tuned, allow_pickle)
    _check_not_an_input(out_folder, (base_model, tuned_model))
    tasks, budget = plan_tasks(_largest_first(pair_tensors(base_model, tuned_model, tensor_filter)), target, budget)
    return Extraction(
        base_model, tuned_model, base_ref, out_folder, overwrite, tuple(tasks), target, tensor_filter, dtype, budget
    )


def _rank_target(rank: int | None, energy: float | None, svd: str) -> RankTarget:
    if rank is None and energy is None:
        raise RecipeError("neither a rank nor an energy is given", hint="set --rank 64, or --energy 0.95, or both")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise RecipeError(f"rank must be a whole number of at least 1, not {rank!r}")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise RecipeError(f"energy is a fraction of the squared difference, above 0 and at most 1, not {energy!r}")
    svd = svd.replace("randomised", "randomized")  # the British spelling is an alias
    if svd not in ("auto", "exact", "randomized"):
        raise RecipeError(f"svd must be auto, exact or randomized, not {svd}")
    if svd == "randomized" and rank is None:
        hint = "set --rank 64, or use --svd exact, which has all singular values"
        raise RecipeError("a randomized SVD needs a rank", hint=hint)
    return RankTarget(rank, energy, svd)


def _tensor_filter(embeddings: str, save_rest: bool, include: Sequence[str], exclude: Sequence[str]) -> TensorFilter:
    if embeddings not in ("lora", "save", "skip"):
        raise RecipeError(f"embeddings must be lora, save or skip, not {embeddings}")
    return TensorFilter(embeddings, save_rest, tuple(include), tuple(exclude))


def _open(name: str, allow_pickle: bool) -> tuple[ModelRef, Checkpoint]:
    path, separator, revision = name.rpartition("@")
    ref = ModelRef(path, revision) if separator and not Path(name).exists() else ModelRef(name)
    fetched = download.fetch(ref.path, ref.revision, ("model",), allow_pickle=allow_pickle)
    folder = fetched.path
    if folder.suffix == ".gguf":
        raise SourceError(f"{name} is a GGUF file", hint="use the 16-bit model that it was converted from")
    if folder.is_dir() and (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*")):
        raise SourceError(f"{name} is an adapter, not a model", hint="merge it into its base first (mergeforge run)")
    checkpoint = open_checkpoint(folder, name, revision=fetched.revision, allow_pickle=allow_pickle)
    if quantized := [
        tensor_name for tensor_name, tensor in checkpoint.tensors.items() if isinstance(tensor, QuantizedTensor)
    ]:
        text = f"{name} is quantized ({quantized[0]}), so the difference would be mostly rounding errors"
        raise SourceError(text, hint="use the 16-bit model")
    return ref, checkpoint


def _check_not_an_input(out: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises OutputError if OUT is, or contains, an input."""
    for checkpoint in checkpoints:
        folders = {checkpoint.folder.resolve(), *(Path(file.path).resolve().parent for file in checkpoint.files)}
        if any(folder == out.resolve() or out.resolve() in folder.parents for folder in folders):
            raise OutputError(f"{out} is, or contains, the input {checkpoint.label}", hint="write to another folder")


def _largest_first(pairs: Sequence[TensorPair]) -> list[TensorPair]:
    """Sort so that no worker starts a large pair when the others have finished."""
    return sorted(pairs, key=lambda pair: (-pair.tuned.info.numel, pair.name))
