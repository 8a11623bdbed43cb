"""Plan: a whole merge, decided from headers alone.

Opens every input, composes each output tensor's way, lays out the files, cuts the tensors into
tiles that fit the memory, and checks the disk. Whatever is wrong is an error here, before a weight
is read or a byte written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.quantized.tensor import QuantizedTensor
from mergeforge.core.sizes import show_size
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import BudgetError, OutputError, RecipeError
from mergeforge.gguf.file_types import ALIASES, FILE_TYPES
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.file_layout import Layout, OutputFile
from mergeforge.io.remote import RemoteSession
from mergeforge.lora.combine import Join, folded_terms, plan_join
from mergeforge.methods import METHODS
from mergeforge.planner.batches import Batch, at_once, by_file, most_open
from mergeforge.planner.compose import MergeGraph
from mergeforge.planner.fp8 import checkpoint_outlets, quantization_config, stored_infos
from mergeforge.planner.gguf import GGUFInputs, GGUFPlan, gguf_config, plan_ggufs
from mergeforge.planner.inputs import Inputs
from mergeforge.planner.stages import Stage, resolve_stages
from mergeforge.planner.tiling import TensorPlan, peak_memory, plan_tiles
from mergeforge.planner.tokenizer import tokenizer_files
from mergeforge.recipe import Recipe, read
from mergeforge.tensors.budget import MAX_REMOTE_CACHE, Budget, make_budget
from mergeforge.writers import safetensors as sink
from mergeforge.writers.encoder import TensorEncoder

__all__ = ["Batch", "Plan", "TensorPlan", "make_plan", "read_recipe"]

NUMERICS = 7  # raised when a version computes other bytes from the same recipe
WORK = ".mergeforge"  # the folder inside OUT where everything unfinished lies
DISK_SLACK = 64 << 20
_ELSEWHERE = ("output", "stream_inputs")  # keys that do not decide any byte by themselves
NOTHING = Layout({}, {})  # no checkpoint is written


@dataclass(frozen=True)
class Plan:
    """The whole merge: where from, how, where to, in which memory."""

    recipe: Recipe
    inputs: Inputs
    out: Path
    budget: Budget
    tensor_plans: tuple[TensorPlan, ...]
    summaries: Mapping[str, str]
    checkpoint: Layout
    ggufs: tuple[GGUFPlan, ...]
    tied_head: bool
    config: Mapping[str, Any] | None
    aux_files: AuxFiles
    notes: tuple[str, ...]
    fingerprint: str
    allow_nonfinite: bool
    combination: Join | None = None

    @property
    def peak(self) -> int:
        """Working memory in bytes beside the interpreter's own: what the tiles can take at most."""
        return peak_memory(self.tensor_plans, self.budget) + self.budget.remote_cache

    @property
    def needs_torch(self) -> bool:
        """Whether torch computes anything: what is copied, or summed by kernels, does without."""
        return not all(piece.is_copy or piece.is_native for piece in self.tensor_plans)

    @property
    def nbytes_read(self) -> int:
        """Bytes of the inputs' weights, each file once."""
        return sum(table.nbytes for table in self.inputs.checkpoints)

    @property
    def nbytes_streamed(self) -> int:
        """Bytes of those that lie elsewhere and are read in pieces."""
        return sum(table.nbytes for table in self.inputs.checkpoints if table.lies_elsewhere)

    @property
    def files(self) -> dict[str, OutputFile]:
        """Every file of weights by name."""
        layouts = [self.checkpoint, *(gguf.layout for gguf in self.ggufs)]
        return {name: file for layout in layouts for name, file in layout.files.items()}

    @property
    def nbytes_written(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @property
    def streams(self) -> bool:
        """Whether finished files go to the Hub while the merge goes on, and do not stay here."""
        return self.recipe.output.publish is not None and self.recipe.output.publish.stream

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """What is carried one after the other: all at once, or file by file where each is sent when it is finished."""
        return (
            by_file(self.tensor_plans, tuple(self.files))
            if self.streams
            else (at_once(self.tensor_plans, tuple(self.files)),)
        )

    @property
    def disk(self) -> int:
        """Bytes of weights that lie on the disk at once, at most."""
        sizes = {name: file.nbytes for name, file in self.files.items()}
        return most_open(self.batches, sizes) if self.streams else sum(sizes.values())

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The checkpoint's tensors in the order of its files."""
        infos = {piece.info.name: piece.info for piece in self.tensor_plans}
        held = {info.name: info for info in stored_infos(infos, self.recipe.output.fp8)}
        return tuple(held[name] for name in self.checkpoint.extents)


def read_recipe(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe, sets: Sequence[str] = ()
) -> Recipe:
    """Read and check a recipe against the known merge methods. Raises RecipeError."""
    return read(source, METHODS, tuple(sets), (*FILE_TYPES, *ALIASES))


def make_plan(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe,
    *,
    out: str | Path | None = None,
    sets: Sequence[str] = (),
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Plan:
    """Decide a merge. Raises RecipeError, SourceError, BudgetError or OutputError."""
    recipe = read_recipe(source, sets)
    where = _where(recipe, out)
    budget = make_budget(memory, device, threads)
    kept = min(budget.memory // 8, MAX_REMOTE_CACHE)
    stage = resolve_stages(recipe, allow_pickle=allow_pickle, link=RemoteSession(kept))
    if stage.inputs.streamed:
        budget = replace(budget, remote_cache=2 * kept)  # as much again for what is on its way
    inputs, ways, infos = stage.inputs, stage.graph.tensors, stage.infos
    name = recipe.output.name or where.absolute().name
    told = gguf_config(stage.config, inputs.reference_model.checkpoint, ways) if recipe.output.gguf else stage.config
    config = stage.config
    if config is not None and recipe.output.fp8:
        config = config | {"quantization_config": quantization_config(infos, config.get("model_type"))}
    given = GGUFInputs(name, told, infos, {**stage.files, **_own_card(inputs)}, budget.device)
    ggufs, gguf_outlets, gguf_notes = plan_ggufs(recipe.output, given)
    stored = stored_infos(infos, recipe.output.fp8)
    checkpoint = sink.lay_out(stored, recipe.output.shard_size) if recipe.output.safetensors else NOTHING
    outlets = _outlets(infos, checkpoint, gguf_outlets)
    pieces, budget = plan_tiles(ways, {name: infos[name] for name in outlets}, outlets, budget)
    actions = {piece.info.name: _action(piece, stage.graph) for piece in pieces}
    _check_output(where, inputs)
    return Plan(
        recipe=recipe,
        inputs=inputs,
        out=where,
        budget=budget,
        tensor_plans=tuple(pieces),
        summaries=actions,
        checkpoint=checkpoint,
        ggufs=tuple(ggufs),
        tied_head=stage.graph.tied,
        config=config if recipe.output.safetensors else None,
        aux_files=stage.files if recipe.output.safetensors else {},
        notes=tuple(dict.fromkeys([*stage.notes, *gguf_notes])),
        fingerprint=_fingerprint(recipe, inputs, [checkpoint, *(gguf.layout for gguf in ggufs)], budget),
        allow_nonfinite=allow_nonfinite,
        combination=_join(recipe, stage, budget),
    )


def _join(recipe: Recipe, stage: Stage, budget: Budget) -> Join | None:
    """The adapter that the recipe's adapters become, if it asks for one."""
    asked = recipe.output.adapter
    if asked is None or stage.inputs.base is None:
        return None
    adapters, base = [one.adapter for one in stage.inputs.adapters], stage.inputs.base.checkpoint
    terms = folded_terms(stage.graph.tensors, base, adapters)
    return plan_join(
        adapters, terms, base, rank=asked.rank, energy=asked.energy, dtype=asked.dtype, memory=budget.memory
    )


def _where(recipe: Recipe, out: str | Path | None) -> Path:
    written = out or recipe.output.path
    if not written:
        raise RecipeError("the recipe has no output.path", hint="add it, or give --out DIR")
    return Path(os.path.expanduser(written))  # noqa: PTH111  # Path's raises for the home of nobody


def _outlets(
    infos: Mapping[str, TensorInfo], checkpoint: Layout, ggufs: Mapping[str, Sequence[TensorEncoder]]
) -> dict[str, list[TensorEncoder]]:
    """What takes each tensor, for those that anything takes, in the order of the checkpoint's files."""
    outlets = checkpoint_outlets(infos, checkpoint)
    for name in infos:
        if ggufs[name]:
            outlets.setdefault(name, []).extend(ggufs[name])
    return outlets


def check_disk(plan: Plan) -> None:
    """Refuse a merge whose files would not fit on the disk. Raises BudgetError."""
    folder = existing_folder(plan.out)
    held = sum(_allocated(plan.out / WORK / name) for name in plan.files)
    free = shutil.disk_usage(folder).free
    needed = plan.disk - held + DISK_SLACK
    if needed > free:
        text = f"the result takes {show_size(needed)} more on the disk of {folder}, which has {show_size(free)} free"
        raise BudgetError(text, hint="make room, or write elsewhere with --out DIR")


def existing_folder(path: Path) -> Path:
    """The nearest folder above (or at) `path` that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _allocated(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _own_card(inputs: Inputs) -> dict[str, Path]:
    """The model card of a model that is converted, not merged: GGUF takes its name, licence and tags from it."""
    card = inputs.reference_model.checkpoint.folder / "README.md"
    alone = len(inputs.all_models) == 1 and not inputs.opened_adapters and len(inputs.stored_models) == 1
    return {card.name: card} if alone and card.is_file() else {}


def _action(piece: TensorPlan, composition: MergeGraph) -> str:
    untouched = (
        f"dequantised from {piece.tensor.packing.about}" if isinstance(piece.tensor, QuantizedTensor) else "cast"
    )
    action = composition.summaries.get(piece.info.name, "copied" if piece.is_copy else untouched)
    stored = piece.tensor.info.dtype
    return action if stored == piece.info.dtype else f"{action}, {stored} to {piece.info.dtype}"


def _check_output(out: Path, inputs: Inputs) -> None:
    """OUT must not be a folder that an input's files lie in, nor a folder inside a model's."""
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file", hint="name a folder to write into")
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} cannot be a folder: {error}") from None
    target = out.resolve()
    above = [folder for folder in (target, *target.parents) if folder.exists()]
    for table in inputs.checkpoints:
        files = {Path(file.path).resolve().parent for file in table.files if isinstance(file, DiskFile)}
        for source in {table.folder.resolve(), *files}:
            if source == target or any(
                source.samefile(folder) and (folder == target or _is_model_folder(folder)) for folder in above
            ):
                raise OutputError(f"{out} is, or lies in, the input {table.folder}", hint="write into another folder")


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()


def _fingerprint(recipe: Recipe, inputs: Inputs, layouts: Sequence[Layout], budget: Budget) -> str:
    """A hash of everything that decides the output's bytes: not of memory, threads or names of folders."""
    raw = [{key: value for key, value in one.items() if key not in _ELSEWHERE} for one in recipe.documents]
    output = recipe.output
    files = [(name, file.header) for layout in layouts for name, file in layout.files.items()]
    facts = {
        "numerics": NUMERICS,
        "recipe": raw if len(raw) > 1 else raw[0],
        "device": budget.device.partition(":")[0],
        "inputs": [[*sorted(table.file_hashes.items()), *_identities(table.files)] for table in inputs.checkpoints],
        "files": {name: hashlib.sha256(header).hexdigest() for name, header in files},
        "gguf_from": output.gguf_from,
        "fp8": output.fp8,
        "adapter": output.adapter,
        "tokenizers": _tokenizers(recipe, inputs),
        "imatrices": [_file_hash(entry.imatrix) for entry in output.gguf if entry.imatrix],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizers(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Hashes of the files that say which rows are which tokens, where that matters."""
    if not any(one.tokenizer for one in (recipe, *recipe.stages)):
        return []
    files = [file for model in inputs.stored_models for file in tokenizer_files(model).values()]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _identities(inputs: Sequence[InputFile]) -> list[tuple[int, Any]]:
    """Size and time of change (or etag) of each file."""
    files = {file.path: file.identity for file in inputs}
    return sorted(((size, changed) for _, size, changed in files.values()), key=str)
