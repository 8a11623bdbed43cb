"""The GGUF files of a merge: key/values, types and targets of every tensor, decided from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import is_head
from mergeforge.checkpoints.ties import tied_head
from mergeforge.core.messages import WarningText
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import RecipeError, SourceError, malformed_as_source_error
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget, build_spec
from mergeforge.gguf.architectures.tensor_mapping import IN_MMPROJ
from mergeforge.gguf.file_types import (
    FileType,
    ModelHparams,
    TypeOverrides,
    file_order,
    file_type_named,
    select_tensor_types,
)
from mergeforge.gguf.general_metadata import general_keys, parameter_counts
from mergeforge.gguf.imatrix import ImatrixFile, read_imatrix
from mergeforge.gguf.key_values import Keys, Value, string, u32
from mergeforge.gguf.low_bit_rules import needs_imatrix
from mergeforge.gguf.mmproj import MMPROJ_CLASSES, build_mmproj
from mergeforge.gguf.mmproj import class_name as tower_class
from mergeforge.gguf.mmproj.mmproj_spec import ARCH as TOWERS
from mergeforge.gguf.pooling import Pooling
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.gguf.vocab import vocabulary
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.file_layout import Layout
from mergeforge.native import bindings
from mergeforge.recipe import GGUFEntry, Output
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content
from mergeforge.writers.gguf import GGUFEncoder, GGUFTensor, lay_out, row_positions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDING = "token_embd.weight"
MMPROJ = "mmproj"  # the type and the prefix of files with towers
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_LAST = ("general.quantization_version", "general.file_type")  # llama-quantize puts them at the end


@dataclass(frozen=True)
class GGUFPlan:
    """One GGUF output (one file, or its splits): its file type, files, and the type of every tensor."""

    file_type: FileType
    layout: Layout
    tensors: tuple[GGUFTensor, ...]
    keys: Keys

    @property
    def first_file(self) -> str:
        """The name of its file, or of the first one of its splits."""
        return next(iter(self.layout.files))

    @property
    def is_mmproj(self) -> bool:
        """Whether it holds the towers of the model, and not the model itself."""
        return bool(self.keys["general.type"].value == MMPROJ)

    @property
    def bits_per_weight(self) -> float:
        weights = sum(
            tensor.nbytes * 8 / (tensor.quant_type.nbytes * 8 / tensor.quant_type.block) for tensor in self.tensors
        )
        return sum(tensor.nbytes for tensor in self.tensors) * 8 / max(weights, 1)

    @property
    def nbytes_by_type(self) -> Mapping[str, int]:
        """Type -> bytes of the tensors in that type."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.quant_type.name] = sizes.get(tensor.quant_type.name, 0) + tensor.nbytes
        return sizes

    @property
    def notes(self) -> list[str]:
        if self.file_type.label == "MXFP4_MOE" and "MXFP4" not in self.nbytes_by_type:
            text = "mxfp4_moe gives 4 bits to stacked experts alone, and this model has none: its matrices become Q8_0"
            return [WarningText(text)]
        return []


@dataclass(frozen=True)
class GGUFInputs:
    """What GGUF files are made from, beside the weights.

    name: the model's name. config, tensors: those of the output. files: the files beside it (tokenizer, model card).
    pooling: that of the reference model, if it is a sentence-transformers folder.
    """

    name: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    files: AuxFiles
    device: str
    pooling: Pooling | None = None


def gguf_config(
    config: Mapping[str, Any] | None, reference: ModelSource, tensors: Mapping[str, LazyTensor]
) -> Mapping[str, Any] | None:
    """The output's config as GGUF needs it: tied where head and embedding are equal, whatever the config says."""
    tied = tied_head(reference)
    if config is None or tied is None or not all(isinstance(tensors.get(name), StoredTensor) for name in tied):
        return config
    head, embedding = (tensors[name] for name in tied)
    assert isinstance(head, StoredTensor) and isinstance(embedding, StoredTensor)
    return {**config, "tie_word_embeddings": same_content(head, embedding)}


def plan_ggufs(output: Output, inputs: GGUFInputs) -> tuple[list[GGUFPlan], dict[str, list[GGUFEncoder]], list[str]]:
    """Every GGUF output, the encoders of every tensor by its name, and notes.

    Raises SourceError where the model cannot be written as GGUF, RecipeError for unknown types.
    """
    encoders: dict[str, list[GGUFEncoder]] = {name: [] for name in inputs.tensors}
    if not output.gguf and not output.mmproj:
        return [], encoders, []
    if not inputs.config:
        raise SourceError("GGUF needs the model's config.json", hint="put it beside the weights")
    plans: list[GGUFPlan] = []
    notes: list[str] = []
    if output.converter:
        types = ", ".join(entry.type for entry in output.gguf)
        notes = [f"llama.cpp's converter writes the GGUF files ({types}) when the merge is done, in memory of its own"]
    elif output.gguf:
        plans, notes = _plan_models(output, inputs.config, inputs, encoders)
    if output.mmproj:
        plans.append(_plan_mmproj(output.mmproj, inputs.config, inputs, encoders))
    return plans, encoders, notes


def _plan_models(
    output: Output, config: Mapping[str, Any], inputs: GGUFInputs, encoders: dict[str, list[GGUFEncoder]]
) -> tuple[list[GGUFPlan], list[str]]:
    """The files of the text model, and notes. Adds their encoders."""
    spec = build_spec(config, inputs.tensors, inputs.pooling)
    if config.get("tie_word_embeddings") is False and (heads := [name for name in spec.dropped if is_head(name)]):
        text = f"{heads[0]} differs from the embedding, but {spec.arch} has no separate output tensor in GGUF"
        raise SourceError(text, hint="write safetensors, or merge so that the two stay tied")
    rows = _shapes(spec)[EMBEDDING][0]
    vocab = vocabulary(inputs.files, config, spec.vocab, rows=rows, pre=output.gguf_pre)
    plans = []
    for entry in output.gguf:
        with malformed_as_source_error("config.json, generation_config.json or the tokenizer"):
            plans.append(_plan(entry, output.gguf_from == "stored", spec, vocab.keys, inputs, encoders))
    notes = [*spec.notes, *vocab.notes, *_tower_notes(output, config, spec)]
    return plans, [*notes, *(note for plan in plans for note in plan.notes)]


def _tower_notes(output: Output, config: Mapping[str, Any], spec: GGUFModelSpec) -> list[str]:
    """What to ask for, if the model's towers are not written."""
    if output.mmproj or IN_MMPROJ not in spec.dropped.values():
        return []
    with malformed_as_source_error("config.json"):
        name = tower_class(config)
    if name in MMPROJ_CLASSES:
        return ["the GGUF file holds the text model; `mmproj: f16` (--mmproj f16) also writes its towers"]
    return [f"the GGUF file holds the text model; mergeforge cannot write the towers of {name}"]


def _plan_mmproj(
    type_: str, config: Mapping[str, Any], inputs: GGUFInputs, encoders: dict[str, list[GGUFEncoder]]
) -> GGUFPlan:
    """The file of the towers and the projector. Adds its encoders."""
    spec = build_mmproj(config, inputs.tensors, inputs.files)
    with malformed_as_source_error("config.json or generation_config.json"):
        return _plan(GGUFEntry(type_), False, spec, {}, inputs, encoders)


def _plan(
    entry: GGUFEntry,
    stored: bool,
    spec: GGUFModelSpec,
    tokenizer: Keys,
    inputs: GGUFInputs,
    encoders: dict[str, list[GGUFEncoder]],
) -> GGUFPlan:
    file_type = file_type_named(entry.type)
    imatrix = read_imatrix(Path(entry.imatrix).expanduser()) if entry.imatrix else None
    tensors = _tensors(entry, file_type, spec, imatrix)
    keys = _keys(file_type, spec, tokenizer, inputs, imatrix)
    prefix = f"{MMPROJ}-" if spec.arch == TOWERS else ""
    layout = lay_out(f"{prefix}{inputs.name}-{file_type.label}", keys, tensors, entry.split_max_size)
    types = {tensor.name: tensor.quant_type for tensor in tensors}
    shared: dict[tuple[int, int], np.ndarray | None] = {}
    for name, targets in spec.targets.items():
        encoders[name] += [
            GGUFEncoder(
                file_type=f"{prefix}{entry.type}",
                info=inputs.tensors[name],
                target=target,
                quant_type=types[target.tensor],
                extent=layout.extents[target.tensor],
                device=inputs.device,
                rounded_to=inputs.tensors[name].dtype if stored else "",
                importance=column_weights(imatrix, target, types[target.tensor], file_type),
                positions=_positions(target, inputs.tensors[name], shared),
            )
            for target in targets
        ]
    return GGUFPlan(file_type, layout, tuple(tensors), keys)


def _positions(
    target: TensorTarget, info: TensorInfo, shared: dict[tuple[int, int], np.ndarray | None]
) -> np.ndarray | None:
    """positions_of the target, computed once for all layers whose targets share their rows."""
    key = (id(target.rows), info.rows)
    if key not in shared:
        shared[key] = row_positions(target, info)
    return shared[key]


def column_weights(
    imatrix: ImatrixFile | None, target: TensorTarget, quant_type: QuantType, file_type: FileType
) -> Tensor | None:
    """The imatrix's column weights, one row for each matrix of the GGUF tensor.

    Raises RecipeError if the type cannot be encoded, or gives useless values without weights and there are none.
    """
    import torch

    if not quant_type.can_encode:
        error = f"{target.tensor} becomes {quant_type.name}, for which the C library is needed, but it"
        raise RecipeError(f"{error} {bindings.why_unavailable()}", hint="choose another type")

    weights = None
    if imatrix is not None and quant_type.block > 1:
        matrices = target.shape[0] if len(target.shape) == 3 else 1
        weights = imatrix.column_weights(target.tensor, target.shape[-1], matrices)
    if weights is not None:
        return torch.from_numpy(weights)
    if needs_imatrix(target.tensor, quant_type.name, file_type.label):
        lacks = f"{imatrix.path} has none for it" if imatrix else "there is none"
        error = f"{target.tensor} becomes {quant_type.name}, which needs an imatrix, but {lacks}"
        raise RecipeError(error, hint="--imatrix FILE, made with llama-imatrix from this model; or another type")
    return None


def _shapes(spec: GGUFModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the GGUF tensors in the converter's order: constants first, then by the last HF tensor of each."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in spec.constants.items()}
    for name in sorted(spec.targets):
        for target in spec.targets[name]:
            shapes.pop(target.tensor, None)
            shapes[target.tensor] = target.shape
    names = _with_stacked_order(list(shapes), spec.stacked_order)
    return {name: shapes[name] for name in names}


def _with_stacked_order(names: list[str], parts: Sequence[str]) -> list[str]:
    """`names`, where the experts of each block follow each other in the order of `parts`."""
    for at, name in enumerate(names):
        block = name.rpartition(".ffn_")[0]
        ordered = [f"{block}.ffn_{part}_exps.weight" for part in parts]
        if name in ordered and set(names[at : at + len(ordered)]) == set(ordered):
            names[at : at + len(ordered)] = ordered
    return names


def _tensors(
    entry: GGUFEntry, file_type: FileType, spec: GGUFModelSpec, imatrix: ImatrixFile | None
) -> list[GGUFTensor]:
    shapes = _shapes(spec)
    selected = select_tensor_types(
        file_type,
        {name: shape for name, shape in shapes.items() if name not in spec.constants},
        model_hparams(spec.arch, spec.keys),
        has_imatrix=imatrix is not None,
        overrides=type_overrides(entry),
        f32={target.tensor for targets in spec.targets.values() for target in targets if target.f32},
    )
    types = dict.fromkeys(spec.constants, QUANT_TYPES["F32"]) | selected | _fixed_types(spec, file_type)
    contents = {name: value.astype("<f4").tobytes() for name, value in spec.constants.items()}
    order = file_order(list(shapes)) if file_type.by_llama_quantize else list(shapes)
    if file_type.by_llama_quantize:
        shapes = {name: without_leading_ones(shape) for name, shape in shapes.items()}
    return [GGUFTensor(name, shapes[name], types[name], contents.get(name, b"")) for name in order]


def _fixed_types(spec: GGUFModelSpec, file_type: FileType) -> dict[str, QuantType]:
    """Tensors that do not have the file's type."""
    is_f16 = file_type.default_type == "F16"
    return {name: QUANT_TYPES[in_f16 if is_f16 else other] for name, (in_f16, other) in spec.fixed_types.items()}


def type_overrides(entry: GGUFEntry) -> TypeOverrides:
    return TypeOverrides(entry.tensor_types, entry.output_type or "", entry.embedding_type or "", entry.pure)


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as llama-quantize writes it (ggml_n_dims): slowest dimensions of 1 are left out."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def model_hparams(arch: str, keys: Keys) -> ModelHparams:
    """The hyperparameters that decide types, from the key/values of a model."""

    def fact(key: str) -> int:
        value = keys.get(f"{arch}.{key}")
        if value is None:
            return 0
        return int(value.value[0] if value.kind == "array" else value.value)

    heads = fact("attention.head_count")
    return ModelHparams(
        arch=arch,
        block_count=fact("block_count"),
        expert_count=fact("expert_count"),
        head_count=heads,
        head_count_kv=fact("attention.head_count_kv") or heads,
    )


def _keys(
    file_type: FileType, spec: GGUFModelSpec, tokenizer: Keys, inputs: GGUFInputs, imatrix: ImatrixFile | None
) -> Keys:
    shapes = _shapes(spec)
    kind = MMPROJ if spec.arch == TOWERS else "model"
    general = {"general.architecture": string(spec.arch), "general.type": string(kind)}
    general |= general_keys(inputs.files, inputs.config or {}, inputs.name, parameter_counts(shapes))
    keys = general | dict(spec.keys) | {"general.quantization_version": u32(QUANTIZATION_VERSION)} | dict(tokenizer)
    if file_type.by_llama_quantize or "general.file_type" in keys:
        keys["general.file_type"] = u32(file_type.number)
    if file_type.by_llama_quantize:
        keys = {key: value for key, value in keys.items() if key not in _LAST} | {key: keys[key] for key in _LAST}
    return keys | (imatrix_keys(imatrix) if imatrix else {})


def imatrix_keys(imatrix: ImatrixFile) -> dict[str, Value]:
    """The keys by which llama-quantize records an imatrix; of the path only the file name."""
    keys = {"quantize.imatrix.file": string(imatrix.path.name)}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = string(imatrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = u32(len(imatrix.weights))
    return keys | ({"quantize.imatrix.chunks_count": u32(imatrix.chunks)} if imatrix.chunks else {})
