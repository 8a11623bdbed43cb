"""The plan of GGUF to GGUF: the tensors of one file in other types, or copied, with other metadata.

Types, the order of tensors and keys, and bytes are those of llama-quantize (src/llama-quant.cpp, build b11549). Tensors
keep their GGUF names and row order, so neither a config.json nor a known architecture is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.adapters.gguf_lora import match_gguf_adapter
from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.gguf_checkpoint import dequantized
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import RecipeError, SourceError, format_list, malformed_as_source_error
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.file_types import FILE_TYPES, FileType, file_order, file_type_named, select_requantized_types
from mergeforge.gguf.imatrix import ImatrixFile, read_imatrix
from mergeforge.gguf.key_values import Keys, Value, u32
from mergeforge.gguf.metadata_edits import chat_template, read_edits
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo, read_gguf
from mergeforge.planner import read_recipe
from mergeforge.planner.base_of_adapters import with_base_of_adapters
from mergeforge.planner.fingerprint import fingerprint
from mergeforge.planner.gguf import (
    QUANTIZATION_VERSION,
    GGUFPlan,
    column_weights,
    imatrix_keys,
    model_hparams,
    type_overrides,
    without_leading_ones,
)
from mergeforge.planner.gguf_lora import gguf_deltas
from mergeforge.planner.inputs import Inputs, OpenAdapter, Opener, OpenModel
from mergeforge.planner.layer_replication import replicate_layers
from mergeforge.planner.options import Options
from mergeforge.planner.outputs import NO_CHECKPOINT
from mergeforge.planner.plan import Plan
from mergeforge.planner.tiling import plan_tiles
from mergeforge.recipe import AdapterEntry, GGUFEntry, Recipe
from mergeforge.tensors.budget import make_budget
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor
from mergeforge.writers.encoder import TensorEncoder
from mergeforge.writers.gguf import GGUFEncoder, GGUFTensor, lay_out, lay_out_splits
from mergeforge.writers.gguf_copy import GGUFCopyEncoder

COPY = "copy"  # the type that keeps every tensor as it is, as in llama-quantize
_PLAIN = ("F32", "F16", "BF16")  # stored as safetensors stores them
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Requantization:
    """What is asked for beside the types.

    allow_requantize: also quantize tensors that are quantized already. keep_split: as many splits as the source has,
    each with the same tensors. metadata: KEY=VALUE texts; chat_template: a new one, as Jinja. adapters: GGUF LoRAs, or
    adapters of the model `base`, with their weights; they are folded in first.
    """

    allow_requantize: bool = False
    keep_split: bool = False
    metadata: tuple[str, ...] = ()
    chat_template: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    base: str | None = None


@dataclass(frozen=True)
class _Source:
    """The file to convert, its keys without those of its splits, and the edits of them."""

    path: Path
    header: GGUFHeader
    keys: Keys
    edits: Keys

    @property
    def arch(self) -> str:
        return str(self.header.get("general.architecture"))


def model_name(path: Path) -> str:
    """The name of the model in a GGUF file: its stem without the number of its split and its type."""
    stem = _SPLIT_NAME.sub("", path.stem)
    name, _, type_ = stem.replace(".", "-").rpartition("-")
    return stem[: len(name)] if name and type_.lower() in FILE_TYPES else stem


def plan_requantization(
    path: Path, entry: Mapping[str, Any], types: Sequence[str], request: Requantization, options: Options
) -> Plan:
    """Plan the files that a GGUF file becomes, one for each type; `entry`: keys of the recipe's output.gguf entries.

    Raises SourceError for a file that cannot be read or requantized, RecipeError for unknown types, BudgetError.
    """
    source = _read_source(path, request)
    recipe, entries = _recipe(path, entry, types, request)
    budget = make_budget(options.memory, options.device, options.threads)
    adapters = _open_adapters(recipe, request, source, allow_pickle=options.allow_pickle)
    model = OpenModel(recipe.base_model or recipe.named_models[0], _checkpoint(source), ())
    work = _Work(source, request, budget.device, adapters)
    ggufs = tuple(work.plan_file(file_entry) for file_entry in entries)
    inputs = Inputs(model, (), adapters) if adapters else Inputs(None, (model,), ())
    infos = {name: _info(tensor) for name, tensor in work.tensors.items()}
    tensor_plans, budget = plan_tiles(work.tensors, infos, work.encoders, budget)
    assert options.out is not None
    return Plan(
        recipe=recipe,
        inputs=inputs,
        out=Path(options.out),
        budget=budget,
        tensor_plans=tuple(tensor_plans),
        summaries=work.summaries,
        checkpoint=NO_CHECKPOINT,
        ggufs=ggufs,
        config=None,
        aux_files={},
        notes=tuple(work.notes),
        fingerprint=fingerprint(recipe, inputs, [gguf.layout for gguf in ggufs], budget),
        allow_nonfinite=False,
        strict=options.strict,
    )


def _info(tensor: LazyTensor) -> TensorInfo:
    """The tensor as it is before it is encoded: float32 after a fold."""
    return tensor.info.with_dtype("F32") if isinstance(tensor, AdaptedTensor) else tensor.info


def _read_source(path: Path, request: Requantization) -> _Source:
    header = read_gguf(path)
    kind = header.get("general.type")
    if not isinstance(header.get("general.architecture"), str):
        raise SourceError(f"{path} has no general.architecture", hint="give a model's GGUF file")
    if kind in ("adapter", "imatrix") or not header.tensors:
        what = f"is an {kind}" if header.tensors else "holds no tensors"
        raise SourceError(f"{path} {what}, not a model", hint="give a model's GGUF file")
    keys = {key: value for key, value in header.keys.items() if key not in (*_SPLIT_KEYS, "general.alignment")}
    if request.keep_split and len(header.hashes) == 1:
        raise SourceError(f"{path} is a single file, so there is no split to keep", hint="leave out --keep-split")
    edits = read_edits(request.metadata, keys)
    if request.chat_template is not None:
        edits |= chat_template(request.chat_template)
    return _Source(path, header, keys, edits)


def _recipe(
    path: Path, entry: Mapping[str, Any], types: Sequence[str], request: Requantization
) -> tuple[Recipe, list[GGUFEntry]]:
    """A recipe that copies the model or folds adapters, and its GGUF entries; a copy has no type in a recipe."""
    listed = [{**entry, "type": "f32" if type_ == COPY else type_} for type_ in types]
    output = {"safetensors": False, "gguf": listed, "name": model_name(path)}
    merge: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": str(path)}]}
    if request.adapters:
        listed_adapters = [{"adapter": adapter, "weight": weight} for adapter, weight in request.adapters]
        merge = {"base_model": str(path), "adapters": listed_adapters}
    recipe = read_recipe({**merge, "output": output})
    entries = zip(recipe.output.gguf, types, strict=True)
    return recipe, [replace(file_entry, type=type_) for file_entry, type_ in entries]


def _open_adapters(
    recipe: Recipe, request: Requantization, source: _Source, *, allow_pickle: bool
) -> tuple[OpenAdapter, ...]:
    """The adapters, with their changes by GGUF name. Raises SourceError where one does not match the file."""
    opened = []
    for entry in recipe.adapters:
        name = str(entry.adapter)
        if name.endswith(".gguf"):
            adapter = match_gguf_adapter(Path(name).expanduser(), name, source.header)
        else:
            adapter = _from_hf(entry, request.base, source, allow_pickle=allow_pickle)
        opened.append(OpenAdapter(entry, adapter))
    return tuple(opened)


def _from_hf(entry: AdapterEntry, base: str | None, source: _Source, *, allow_pickle: bool) -> Adapter:
    """An adapter of the Hugging Face model that the GGUF file was made from."""
    recipe = read_recipe({"adapters": [str(entry.adapter)]} | ({"base_model": base} if base else {}))
    opener = Opener(replicate_layers, allow_pickle=allow_pickle)
    inputs = opener.open(with_base_of_adapters(recipe, opener))
    assert inputs.base is not None
    adapter = inputs.adapters[0].adapter
    deltas = gguf_deltas(adapter, inputs.base.checkpoint)
    for name, changes in deltas.items():
        stored = source.header.tensors.get(name)
        if stored is None or any(isinstance(delta, LoraDelta) and delta.shape != stored.shape for delta in changes):
            text = f"{source.path} has no {name} of the shape that {adapter.label} changes"
            raise SourceError(text, hint="give the GGUF file of the adapter's base model")
    return replace(adapter, deltas=deltas, resized={})


def _checkpoint(source: _Source) -> Checkpoint:
    tensors: dict[str, Any] = {name: _raw(stored) for name, stored in source.header.tensors.items()}
    return Checkpoint(str(source.path), source.path.parent, None, tensors, {}, source.header.hashes)


def _matrix(stored: GGUFTensorInfo) -> tuple[int, int]:
    """The shape of a tensor seen as rows."""
    return math.prod(stored.shape[:-1]), stored.shape[-1]


def _raw(stored: GGUFTensorInfo) -> StoredTensor:
    """The bytes of a tensor as they are stored, in rows."""
    rows, columns = _matrix(stored)
    info = TensorInfo(stored.name, "U8", (rows, stored.row_nbytes(columns)))
    return StoredTensor(info, stored.file, stored.offset)


def _values(stored: GGUFTensorInfo) -> LazyTensor:
    """The values of a tensor. Raises SourceError for types that cannot be dequantized."""
    if stored.ggml_type in _PLAIN:
        return StoredTensor(TensorInfo(stored.name, stored.ggml_type, _matrix(stored)), stored.file, stored.offset)
    target = TensorTarget(stored.name, _matrix(stored))
    return dequantized(TensorInfo(stored.name, "F32", _matrix(stored)), [(target, stored)])


class _Work:
    """The tensors that are read, what encodes each, and what is done to it, in words; filled file by file."""

    def __init__(
        self, source: _Source, request: Requantization, device: str, adapters: Sequence[OpenAdapter] = ()
    ) -> None:
        self.source = source
        self.terms: dict[str, list[tuple[float, WeightDelta]]] = {}
        for opened in adapters:
            for name, deltas in opened.adapter.deltas.items():
                weight = float(opened.entry.weight)  # as _recipe() writes it
                self.terms.setdefault(name, []).extend((weight, delta) for delta in deltas)
        self.request = request
        self.device = device
        self.tensors: dict[str, LazyTensor] = {}
        self.encoders: dict[str, list[TensorEncoder]] = {}
        self.summaries: dict[str, str] = {}
        self.notes: list[str] = []

    def plan_file(self, entry: GGUFEntry) -> GGUFPlan:
        """Lay out one file (or its splits), and add the encoders of its tensors."""
        stored = self._in_order()
        imatrix = read_imatrix(Path(entry.imatrix).expanduser()) if entry.imatrix else None
        file_type, changed = self._types(entry, stored, imatrix)
        types = {name: changed.get(name, tensor.quant_type) for name, tensor in stored.items()}
        tensors = [GGUFTensor(name, without_leading_ones(stored[name].shape), types[name]) for name in stored]
        keys = self._keys(entry, file_type, imatrix)
        stem = f"{model_name(self.source.path)}-{file_type.label}"
        if self.request.keep_split:
            layout = lay_out_splits(stem, keys, self._splits(tensors))
        else:
            layout = lay_out(stem, keys, tensors, entry.split_max_size)
        self._check_sources(stored, types)
        for tensor in tensors:
            self._add_encoder(entry, stored[tensor.name], tensor.quant_type, layout.extents[tensor.name], imatrix)
        return GGUFPlan(file_type, layout, tuple(tensors), keys)

    def _in_order(self) -> dict[str, GGUFTensorInfo]:
        """The tensors in llama-quantize's order: by layer and name, or as they are in the splits that are kept."""
        tensors = self.source.header.tensors
        if not self.request.keep_split:
            return {name: tensors[name] for name in file_order(list(tensors))}
        return dict(sorted(tensors.items(), key=lambda item: (self._split_of(item[1]), item[1].offset)))

    def _split_of(self, stored: GGUFTensorInfo) -> int:
        return list(self.source.header.hashes).index(Path(stored.file.path).name)

    def _splits(self, tensors: Sequence[GGUFTensor]) -> list[list[GGUFTensor]]:
        splits: list[list[GGUFTensor]] = [[] for _ in self.source.header.hashes]
        for tensor in tensors:
            splits[self._split_of(self.source.header.tensors[tensor.name])].append(tensor)
        return splits

    def _types(
        self, entry: GGUFEntry, stored: Mapping[str, GGUFTensorInfo], imatrix: ImatrixFile | None
    ) -> tuple[FileType, Mapping[str, QuantType]]:
        """The file type, and the types of tensors that llama-quantize chooses."""
        if entry.type == COPY:
            if imatrix or entry.tensor_types or entry.output_type or entry.embedding_type or entry.pure:
                raise RecipeError("types and an imatrix are for quantizing, and no type was given", hint="add --type")
            number = self.source.header.get("general.file_type")
            known = [file_type for file_type in FILE_TYPES.values() if file_type.number == number]
            return known[0] if known else FileType("COPY", 0, ""), {}
        file_type = file_type_named(entry.type)
        with malformed_as_source_error(self.source.path):
            model = model_hparams(self.source.arch, self._edited(self.source.keys))
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            has_imatrix = imatrix is not None
            return file_type, select_requantized_types(
                file_type, shapes, model, has_imatrix=has_imatrix, overrides=type_overrides(entry)
            )

    def _keys(self, entry: GGUFEntry, file_type: FileType, imatrix: ImatrixFile | None) -> Keys:
        """The source's keys, with those that describe the quantization at the end, then what is edited."""
        own = {"general.quantization_version": u32(QUANTIZATION_VERSION)}
        if entry.type != COPY:
            own["general.file_type"] = u32(file_type.number)
        elif "general.file_type" in self.source.keys:
            own["general.file_type"] = self.source.keys["general.file_type"]
        keys = _replaced(self.source.keys, own)
        return _replaced(self._edited(keys), imatrix_keys(imatrix) if imatrix else {})

    def _edited(self, keys: Keys) -> Keys:
        return _replaced(keys, self.source.edits)

    def _check_sources(self, stored: Mapping[str, GGUFTensorInfo], types: Mapping[str, QuantType]) -> None:
        """Refuse to quantize what is quantized, unless that is allowed. Raises SourceError."""
        again = [
            name
            for name, tensor in stored.items()
            if tensor.block > 1 and (types[name].name != tensor.ggml_type or name in self.terms)
        ]
        if not again:
            return
        before = format_list(sorted({stored[name].ggml_type for name in again}))
        count = f"{len(again)} of {len(stored)} tensors"
        if not self.request.allow_requantize:
            text = f"{self.source.path} is quantized: {count} would be quantized again, from {before}"
            raise SourceError(text, hint="use the F16 or BF16 file, or --allow-requantize for a worse result")
        note = f"{count} are quantized again, from {before}: the result is worse than from the original model"
        if note not in self.notes:
            self.notes.append(note)

    def _value(self, stored: GGUFTensorInfo) -> LazyTensor:
        """The values of a tensor, with adapters folded in."""
        terms = self.terms.get(stored.name)
        return AdaptedTensor(_values(stored), tuple(terms)) if terms else _values(stored)

    def _add_encoder(
        self, entry: GGUFEntry, stored: GGUFTensorInfo, quant_type: QuantType, extent: Any, imatrix: ImatrixFile | None
    ) -> None:
        """Copy a tensor that keeps its type; of plain types also the values are checked."""
        key = f"{entry.type}/{stored.name}"
        same_type = quant_type.name == stored.ggml_type
        if same_type and stored.ggml_type not in _PLAIN and stored.name not in self.terms:
            raw = _raw(stored)
            tensor = replace(raw, info=raw.info.renamed(key))
            encoder: TensorEncoder = GGUFCopyEncoder(key, stored.ggml_type, tensor.info, extent)
            self.tensors[key], self.encoders[key] = tensor, [encoder]
            self.summaries[key] = f"{stored.ggml_type} copied"
            return
        if quant_type.name not in QUANT_TYPES:
            text = f"{stored.name} cannot be written as {quant_type.name} again after a fold"
            raise SourceError(text, hint="choose another type with --type")
        value = self.tensors.setdefault(stored.name, self._value(stored))
        target = TensorTarget(stored.name, stored.shape)
        importance = column_weights(imatrix, target, quant_type)
        encoder = GGUFEncoder(entry.type, value.info, target, quant_type, extent, self.device, importance=importance)
        self.encoders.setdefault(stored.name, []).append(encoder)
        names = [encoder.label.removeprefix("GGUF ") for encoder in self.encoders[stored.name]]
        folds = f", {len(self.terms[stored.name])} LoRA folded in" if stored.name in self.terms else ""
        self.summaries[stored.name] = f"{stored.ggml_type} to {', '.join(dict.fromkeys(names))}{folds}"


def _replaced(keys: Keys, new: Mapping[str, Value]) -> dict[str, Value]:
    """Keys with others in their place, which come last, as in llama.cpp."""
    return {key: value for key, value in keys.items() if key not in new} | dict(new)
