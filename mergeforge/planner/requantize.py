"""The plan of GGUF to GGUF: the tensors of one file in other types, or copied, with other metadata.

Types, the order of tensors and keys, and bytes are those of llama-quantize (src/llama-quant.cpp, build b11549). Tensors
keep their GGUF names and row order, so neither a config.json nor a known architecture is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import WeightDelta
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import RecipeError, SourceError, format_list, malformed_as_source_error
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.file_types import FILE_TYPES, FileType, file_order, file_type_named, select_requantized_types
from mergeforge.gguf.imatrix import ImatrixFile, read_imatrix
from mergeforge.gguf.key_values import Keys, Value, u32
from mergeforge.gguf.metadata_edits import chat_template, read_edits
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.gguf.reader import GGUFTensorInfo
from mergeforge.io.file_layout import Extent
from mergeforge.planner import read_recipe
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
from mergeforge.planner.gguf_adapters import open_adapters_for
from mergeforge.planner.gguf_source import PLAIN, GGUFSource, model_name, raw_tensor, read_source, tensor_values
from mergeforge.planner.inputs import Inputs, OpenAdapter, OpenModel
from mergeforge.planner.options import Options
from mergeforge.planner.outputs import NO_CHECKPOINT
from mergeforge.planner.plan import Plan
from mergeforge.planner.tiling import plan_tiles
from mergeforge.recipe import GGUFEntry, Recipe
from mergeforge.tensors.budget import make_budget
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.writers.encoder import TensorEncoder
from mergeforge.writers.gguf import GGUFEncoder, GGUFTensor, lay_out, lay_out_splits
from mergeforge.writers.gguf_copy import GGUFCopyEncoder

COPY = "copy"  # the type that keeps every tensor as it is, as in llama-quantize


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

    @property
    def options(self) -> list[str]:
        """The options of `mergeforge gguf` that were given."""
        given = {
            "--allow-requantize": self.allow_requantize,
            "--keep-split": self.keep_split,
            "--set-metadata": self.metadata,
            "--chat-template": self.chat_template is not None,
            "--adapter": self.adapters,
            "--base": self.base,
        }
        return [option for option, value in given.items() if value]


def plan_requantization(
    path: Path, entry: Mapping[str, Any], types: Sequence[str], request: Requantization, options: Options
) -> Plan:
    """Plan the files that a GGUF file becomes, one for each type; `entry`: keys of the recipe's output.gguf entries.

    Raises SourceError for a file that cannot be read or requantized, RecipeError for unknown types, BudgetError.
    """
    source = read_source(path)
    edits = _edits(source, request)
    recipe, entries = _recipe(path, entry, types, request)
    budget = make_budget(options.memory, options.device, options.threads)
    adapters = open_adapters_for(source, recipe.adapters, request.base, allow_pickle=options.allow_pickle)
    model = OpenModel(recipe.base_model or recipe.named_models[0], source.checkpoint, ())
    work = _Work(source, edits, request, budget.device, adapters)
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
        notes=(*work.notes, *(note for gguf in ggufs for note in gguf.notes)),
        fingerprint=fingerprint(recipe, inputs, [gguf.layout for gguf in ggufs], budget),
        allow_nonfinite=False,
        strict=options.strict,
    )


def _info(tensor: LazyTensor) -> TensorInfo:
    """The tensor as it is before it is encoded: float32 after a fold."""
    return tensor.info.with_dtype("F32") if isinstance(tensor, AdaptedTensor) else tensor.info


def _edits(source: GGUFSource, request: Requantization) -> Keys:
    """The metadata that is changed. Raises RecipeError, and SourceError if there is no split to keep."""
    if request.keep_split and len(source.splits) == 1:
        raise SourceError(
            f"{source.path} is a single file, so there is no split to keep", hint="leave out --keep-split"
        )
    edits = read_edits(request.metadata, source.keys)
    return edits | (chat_template(request.chat_template) if request.chat_template is not None else {})


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


class _Work:
    """The tensors that are read, what encodes each, and what is done to it, in words; filled file by file."""

    def __init__(
        self, source: GGUFSource, edits: Keys, request: Requantization, device: str, adapters: Sequence[OpenAdapter]
    ) -> None:
        self.source = source
        self.edits = edits
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
            self._add_encoder(
                entry, stored[tensor.name], file_type, tensor.quant_type, layout.extents[tensor.name], imatrix
            )
        return GGUFPlan(file_type, layout, tuple(tensors), keys)

    def _in_order(self) -> dict[str, GGUFTensorInfo]:
        """The tensors in llama-quantize's order: by layer and name, or as they are in the splits that are kept."""
        tensors = self.source.header.tensors
        if not self.request.keep_split:
            return {name: tensors[name] for name in file_order(list(tensors))}
        return dict(sorted(tensors.items(), key=lambda item: (self.source.split_of(item[1]), item[1].offset)))

    def _splits(self, tensors: Sequence[GGUFTensor]) -> list[list[GGUFTensor]]:
        splits: list[list[GGUFTensor]] = [[] for _ in self.source.splits]
        for tensor in tensors:
            splits[self.source.split_of(self.source.header.tensors[tensor.name])].append(tensor)
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
        return _replaced(keys, self.edits)

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
        values = tensor_values(stored)
        return AdaptedTensor(values, tuple(terms)) if terms else values

    def _add_encoder(
        self,
        entry: GGUFEntry,
        stored: GGUFTensorInfo,
        file_type: FileType,
        quant_type: QuantType,
        extent: Extent,
        imatrix: ImatrixFile | None,
    ) -> None:
        """Copy a tensor that keeps its type; of plain types also the values are checked."""
        key = f"{entry.type}/{stored.name}"
        same_type = quant_type.name == stored.ggml_type
        if same_type and stored.ggml_type not in PLAIN and stored.name not in self.terms:
            raw = raw_tensor(stored)
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
        importance = column_weights(imatrix, target, quant_type, file_type)
        encoder = GGUFEncoder(entry.type, value.info, target, quant_type, extent, self.device, importance=importance)
        self.encoders.setdefault(stored.name, []).append(encoder)
        names = [encoder.label.removeprefix("GGUF ") for encoder in self.encoders[stored.name]]
        folds = f", {len(self.terms[stored.name])} LoRA folded in" if stored.name in self.terms else ""
        self.summaries[stored.name] = f"{stored.ggml_type} to {', '.join(dict.fromkeys(names))}{folds}"


def _replaced(keys: Keys, new: Mapping[str, Value]) -> dict[str, Value]:
    """Keys with others in their place, which come last, as in llama.cpp."""
    return {key: value for key, value in keys.items() if key not in new} | dict(new)
