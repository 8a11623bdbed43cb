"""The GGUF files of a merge: keys, types and places of every tensor, decided from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.checkpoints.names import is_head, tied_head
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, refused_if_odd
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget, build_spec
from mergeforge.gguf.file_types import (
    FileType,
    FileTypeFacts,
    TypeOverrides,
    file_order,
    file_type_named,
    select_tensor_types,
)
from mergeforge.gguf.general_metadata import metadata, parameter_counts
from mergeforge.gguf.imatrix import ImatrixFile, read_imatrix
from mergeforge.gguf.key_values import Keys, Value, text, u32
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.gguf.vocab import vocabulary
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.file_layout import Layout
from mergeforge.recipe import GGUFEntry, Output
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content
from mergeforge.writers.gguf import GGUFEncoder, GGUFTensor, lay_out, positions_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDING = "token_embd.weight"
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_LAST = ("general.quantization_version", "general.file_type")  # llama-quantize puts them at the end


@dataclass(frozen=True)
class GGUFPlan:
    """One GGUF output (one file, or its splits): its mix, files, and what every tensor is encoded in."""

    file_type: FileType
    layout: Layout
    tensors: tuple[GGUFTensor, ...]
    keys: Keys

    @property
    def bits_per_weight(self) -> float:
        weights = sum(
            tensor.nbytes * 8 / (tensor.quant_type.nbytes * 8 / tensor.quant_type.block) for tensor in self.tensors
        )
        return sum(tensor.nbytes for tensor in self.tensors) * 8 / max(weights, 1)

    @property
    def nbytes_by_type(self) -> Mapping[str, int]:
        """Type -> bytes of tensors in it."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.quant_type.name] = sizes.get(tensor.quant_type.name, 0) + tensor.nbytes
        return sizes


@dataclass(frozen=True)
class GGUFInputs:
    """What GGUF files are made of beside the weights: the output's config and tensors, and the files beside it.

    `name`: what the model is called; `files`: name -> path; `plain`: the model is converted, not merged.
    """

    name: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    files: AuxFiles
    device: str


def gguf_config(
    config: Mapping[str, Any] | None, donor: ModelSource, ways: Mapping[str, LazyTensor]
) -> Mapping[str, Any] | None:
    """The output's config as GGUF spells it: tied where the stored head is the embedding, whatever the config says."""
    tied = tied_head(donor)
    if config is None or tied is None or not all(isinstance(ways.get(name), StoredTensor) for name in tied):
        return config
    head, embedding = (ways[name] for name in tied)
    assert isinstance(head, StoredTensor) and isinstance(embedding, StoredTensor)
    return {**config, "tie_word_embeddings": same_content(head, embedding)}


def plan_ggufs(output: Output, given: GGUFInputs) -> tuple[list[GGUFPlan], dict[str, list[GGUFEncoder]], list[str]]:
    """Every GGUF output, the outlets of every tensor by its name, and notes.

    Raises SourceError where the model cannot be written as GGUF, RecipeError for types that are not known.
    """
    outlets: dict[str, list[GGUFEncoder]] = {name: [] for name in given.tensors}
    if not output.gguf:
        return [], outlets, []
    if not given.config:
        raise SourceError("GGUF needs the model's config.json", hint="put it beside the weights")
    spelling = build_spec(given.config, given.tensors)
    if given.config.get("tie_word_embeddings") is False and (
        heads := [one for one in spelling.dropped if is_head(one)]
    ):
        text = f"{heads[0]} differs from the embedding, and a {spelling.arch} in GGUF has no output of its own"
        raise SourceError(text, hint="write safetensors; or merge so that the two stay tied")
    rows = _shapes(spelling)[EMBEDDING][0]
    vocab = vocabulary(given.files, given.config, spelling.vocab, rows=rows, pre=output.gguf_pre)
    plans = []
    for entry in output.gguf:
        with refused_if_odd("what config.json, generation_config.json or the tokenizer says of the model"):
            plan, added = _plan(entry, output.gguf_from == "stored", spelling, vocab.keys, given)
        plans.append(plan)
        for name, some in added.items():
            outlets[name] += some
    notes = [*spelling.notes, *vocab.notes]
    return plans, outlets, notes


def _plan(
    entry: GGUFEntry, stored: bool, spelling: GGUFModelSpec, tokenizer: Keys, given: GGUFInputs
) -> tuple[GGUFPlan, dict[str, list[GGUFEncoder]]]:
    mix = file_type_named(entry.type)
    importance = read_imatrix(Path(entry.imatrix).expanduser()) if entry.imatrix else None
    tensors = _tensors(entry, mix, spelling, importance)
    keys = _keys(mix, spelling, tokenizer, given, importance)
    layout = lay_out(f"{given.name}-{mix.label}", keys, tensors, entry.split_max_size)
    kinds = {tensor.name: tensor.quant_type for tensor in tensors}
    shared: dict[tuple[int, int], np.ndarray | None] = {}
    outlets = {
        name: [
            GGUFEncoder(
                sink=entry.type,
                info=given.tensors[name],
                target=place,
                quant_type=kinds[place.tensor],
                extent=layout.extents[place.tensor],
                device=given.device,
                stored=given.tensors[name].dtype if stored else "",
                importance=_weights(importance, place, kinds[place.tensor]),
                positions=_positions(place, given.tensors[name], shared),
            )
            for place in places
        ]
        for name, places in spelling.targets.items()
    }
    return GGUFPlan(mix, layout, tuple(tensors), keys), outlets


def _positions(
    place: TensorTarget, info: TensorInfo, shared: dict[tuple[int, int], np.ndarray | None]
) -> np.ndarray | None:
    """positions_of the place, made once for all layers whose places share their rows."""
    key = (id(place.rows), info.rows)
    if key not in shared:
        shared[key] = positions_of(place, info)
    return shared[key]


def _weights(importance: ImatrixFile | None, place: TensorTarget, kind: QuantType) -> Tensor | None:
    """The imatrix's column weights, a row for each matrix of the GGUF tensor."""
    import torch

    if importance is None or kind.block == 1:
        return None
    matrices = place.shape[0] if len(place.shape) == 3 else 1
    found = importance.of(place.tensor, place.shape[-1], matrices)
    return None if found is None else torch.from_numpy(found)


def _shapes(spelling: GGUFModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the GGUF tensors in the converter's order: constants, then as the last part of each comes."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in spelling.constants.items()}
    for name in sorted(spelling.targets):
        for place in spelling.targets[name]:
            shapes.pop(place.tensor, None)
            shapes[place.tensor] = place.shape
    return shapes


def _tensors(
    entry: GGUFEntry, mix: FileType, spelling: GGUFModelSpec, importance: ImatrixFile | None
) -> list[GGUFTensor]:
    shapes = _shapes(spelling)
    chosen = select_tensor_types(
        mix,
        {name: shape for name, shape in shapes.items() if name not in spelling.constants},
        _model_facts(spelling),
        has_importance=importance is not None,
        wishes=TypeOverrides(entry.tensor_types, entry.output_type or "", entry.embedding_type or "", entry.pure),
        f32={place.tensor for places in spelling.targets.values() for place in places if place.f32},
    )
    kinds = dict.fromkeys(spelling.constants, QUANT_TYPES["F32"]) | chosen
    contents = {name: value.astype("<f4").tobytes() for name, value in spelling.constants.items()}
    order = file_order(list(shapes)) if mix.quantizer else list(shapes)
    if mix.quantizer:
        shapes = {name: _without_ones(shape) for name, shape in shapes.items()}
    return [GGUFTensor(name, shapes[name], kinds[name], contents.get(name, b"")) for name in order]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as llama-quantize writes it (ggml_n_dims): slowest dimensions of 1 are left out."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _model_facts(spelling: GGUFModelSpec) -> FileTypeFacts:
    def fact(key: str) -> int:
        value = spelling.keys.get(f"{spelling.arch}.{key}")
        if value is None:
            return 0
        return int(value.value[0] if value.kind == "array" else value.value)

    heads = fact("attention.head_count")
    return FileTypeFacts(
        arch=spelling.arch,
        block_count=fact("block_count"),
        expert_count=fact("expert_count"),
        head_count=heads,
        head_count_kv=fact("attention.head_count_kv") or heads,
    )


def _keys(
    mix: FileType, spelling: GGUFModelSpec, tokenizer: Keys, given: GGUFInputs, importance: ImatrixFile | None
) -> Keys:
    shapes = _shapes(spelling)
    general = {"general.architecture": text(spelling.arch), "general.type": text("model")}
    general |= metadata(given.files, given.config or {}, given.name, parameter_counts(shapes))
    keys = general | dict(spelling.keys) | {"general.quantization_version": u32(QUANTIZATION_VERSION)} | dict(tokenizer)
    if mix.quantizer or "general.file_type" in keys:
        keys["general.file_type"] = u32(mix.file_type)
    if mix.quantizer:
        keys = {key: value for key, value in keys.items() if key not in _LAST} | {key: keys[key] for key in _LAST}
    return keys | (_imatrix_keys(importance) if importance else {})


def _imatrix_keys(importance: ImatrixFile) -> dict[str, Value]:
    """As llama-quantize notes an imatrix; the file by its name alone."""
    keys = {"quantize.imatrix.file": text(importance.path.name)}
    if importance.datasets:
        keys["quantize.imatrix.dataset"] = text(importance.datasets[0])
    keys["quantize.imatrix.entries_count"] = u32(len(importance.weights))
    return keys | ({"quantize.imatrix.chunks_count": u32(importance.chunks)} if importance.chunks else {})
