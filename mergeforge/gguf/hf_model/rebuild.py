"""The model that a GGUF file holds, found by trying the classes of its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.messages import WarningText
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import MALFORMED_ERRORS, SourceError, format_list
from mergeforge.gguf.architectures import GGUFModelSpec, build_spec
from mergeforge.gguf.architectures.model import MAX_LAYERS
from mergeforge.gguf.hf_model.classes import HFClass, classes_of, known_architectures
from mergeforge.gguf.hf_model.config import propose_config, set_flags, text_part, unset_paths
from mergeforge.gguf.hf_model.keys import ModelKeys
from mergeforge.gguf.hf_model.old_files import modern_keys, modern_shapes
from mergeforge.gguf.hf_model.shapes import Shape
from mergeforge.gguf.hf_model.tensors import CONSTANTS, TensorLayout, lay_out_tensors
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo

if TYPE_CHECKING:
    import numpy as np

MAX_HEADS = 1 << 16
MAX_HEAD_SIZE = 1 << 16
MAX_CONSTANT = 1 << 16  # elements of a tensor that is computed from the config
_UNCOMPARED = ("general.", "tokenizer.", "split.", "quantize.")
_IN_TOWER = ("n_deepstack_layers",)  # keys that count layers of a tower that the file does not hold
_IMPLIED = ("attention.key_length", "attention.value_length", "vocab_size")  # follow from others, where absent
_PRE_TOKENIZERS = {"Glm4MoeLiteForCausalLM": ("glm4",), "KimiK25ForConditionalGeneration": ("kimi-k2",)}
_VOCABULARIES = {"BertModel": ("bert",), "RobertaModel": ("gpt2", "bert"), "XLMRobertaModel": ("t5",)}
_DAMAGED = "the file is damaged: download it again"
_HINT = "use the folder of the model that the file was made from"


@dataclass(frozen=True)
class RebuiltModel:
    """The config and the stored tensors of the model in a GGUF file, and how they become the file's."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    spec: GGUFModelSpec
    notes: tuple[str, ...] = ()


def rebuild_model(header: GGUFHeader, path: Path, dtype: str = "float32") -> RebuiltModel:
    """The Hugging Face model of a GGUF file; dtype: torch's name for config.json.

    Raises SourceError for an unknown architecture, and for keys and tensors that no class of it has.
    """
    arch = header.get("general.architecture")
    if not isinstance(arch, str):
        raise SourceError(f"{path} has no general.architecture", hint="give a model's GGUF file")
    if not (entries := classes_of(arch)):
        known = format_list(sorted(known_architectures()))
        raise SourceError(f"{path}: the architecture {arch!r} is not known", hint=f"known are {known}")
    keys = ModelKeys(arch, modern_keys(arch, header.keys), modern_shapes(header.tensors), _reader(header))
    _check_numbers(keys, {name for entry in entries for name in entry.keys}, path)
    _check_counts(keys, path)
    problems: list[str] = []
    candidates: list[_Candidate] = []
    for entry in entries:
        try:
            candidates.append(_candidate(entry, keys, dtype))
        except SourceError as error:
            problems.append(f"{error}")
        except MALFORMED_ERRORS as error:
            problems.append(f"the value of a key has the wrong type or is out of range ({error})")
        if candidates and not any(candidates[-1].strangeness):
            return candidates[-1].model
    if not candidates:
        raise SourceError(f"{path} does not hold a whole {entries[0].name}: {problems[0]}", hint=_HINT)
    return min(candidates, key=lambda candidate: candidate.strangeness).model


def _check_numbers(keys: ModelKeys, names: Set[str], path: Path) -> None:
    """Raise SourceError for a key that is no number, or a list with such an item; names: keys of the architecture."""
    for name in sorted(names):
        value = keys.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if wrong := [item for item in items if not isinstance(item, int | float) or not math.isfinite(item)]:
            text = f"{path}: {keys.arch}.{name} is {wrong[0]!r}, but must be a number"
            raise SourceError(text, hint=_DAMAGED)


def _check_counts(keys: ModelKeys, path: Path) -> None:
    """Raise SourceError for numbers of layers, heads and positions, and sizes of heads, that no model has."""
    attends = any(name.endswith((".attn_q.weight", ".attn_k.weight")) for name in keys.shapes)
    for name in ("block_count", "attention.head_count", "attention.head_count_kv"):
        count = keys.get(name)
        most = max(count, default=0) if isinstance(count, list) else count
        wrong = not isinstance(most, int) or not 0 < most <= (MAX_LAYERS if name == "block_count" else MAX_HEADS)
        if wrong and (name == "block_count" or (attends and count is not None)):
            text = f"{path}: {keys.arch}.{name} is {count}"
            raise SourceError(text, hint=_DAMAGED)
    limits = {"attention.key_length": MAX_HEAD_SIZE, "attention.key_length_swa": MAX_HEAD_SIZE}
    if table := keys.shapes.get("position_embd.weight"):
        limits["context_length"] = table[0]
    for name, limit in limits.items():
        value = keys.get(name)
        if not isinstance(value, list) and (value or 0) > limit:
            raise SourceError(f"{path}: {keys.arch}.{name} is {value}, but at most {limit} fits", hint=_DAMAGED)


@dataclass(frozen=True)
class _Candidate:
    """A model that becomes the file's keys and tensors; strangeness: how much the file has, or lacks, beside it."""

    model: RebuiltModel
    strangeness: tuple[int, ...]


def _candidate(entry: HFClass, keys: ModelKeys, dtype: str) -> _Candidate:
    """The model of a class in the file. Raises SourceError if there is none."""
    config = propose_config(entry, keys, dtype)
    part = text_part(config)
    layers = int(part.get("num_hidden_layers") or keys.get("block_count") or 0)
    layout = _best_layout(entry, keys.shapes, layers, int(part.get("max_position_embeddings") or 0))
    set_flags(config, entry, layout.found)
    spec = build_spec(config, layout.tensors)
    extra, _ = _differences(spec, keys)
    extra = [name for name in extra if name not in _IMPLIED and not name.startswith("rope.")]
    if extra and unset_paths(config, entry, extra):
        spec = build_spec(config, layout.tensors)
    _, different = _differences(spec, keys)
    if different:
        raise SourceError(f"its key {format_list(different)} does not fit to the others")
    _check_tensors(spec, keys.shapes)
    unknown = [name for name in keys.values if name.startswith(f"{keys.arch}.") and name not in spec.keys]
    missing = [name for name in layout.missing if "{" not in name]
    model = RebuiltModel(config, layout.tensors, spec, (*_notes(entry, spec, keys), *_unknown_note(unknown)))
    return _Candidate(model, (_has_other_vocabulary(entry, keys), len(unknown) + len(extra), len(missing)))


def _has_other_vocabulary(entry: HFClass, keys: ModelKeys) -> bool:
    """Whether models of this class have another kind of vocabulary or pre-tokenizer."""
    kind, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    kinds, names = _VOCABULARIES.get(entry.name), _PRE_TOKENIZERS.get(entry.name, ())
    of_others = [name for other in classes_of(entry.arch) for name in _PRE_TOKENIZERS.get(other.name, ())]
    other_kind = kinds is not None and kind not in (None, *kinds)
    return other_kind or (pre not in names if names else pre in of_others)


def _best_layout(entry: HFClass, shapes: Mapping[str, Shape], layers: int, positions: int) -> TensorLayout:
    """The layout that uses all tensors and lacks the fewest. Raises SourceError."""
    layouts = []
    for variant in entry.variants:
        filled = {target for pattern in variant for target in pattern.targets}
        names = {pattern.name for pattern in variant}
        more = [pattern for pattern in entry.optional if pattern.name not in names and not filled & {*pattern.targets}]
        layout = lay_out_tensors((*variant, *more), shapes, layers, positions)
        layouts.append((len(layout.unused), len(layout.missing & names), layout))
    layout = min(layouts, key=lambda found: found[:2])[2]
    if layout.unused:
        raise SourceError(f"a {entry.name} has no tensor {format_list(layout.unused)}")
    return layout


def _differences(spec: GGUFModelSpec, keys: ModelKeys) -> tuple[list[str], list[str]]:
    """Keys that only the rebuilt model has, and those that have another value in the file."""
    extra, different = [], []
    for name in spec.keys:
        if name.startswith(_UNCOMPARED):
            continue
        short = name.removeprefix(f"{spec.arch}.")
        stored = keys.get(short)
        if short in _IN_TOWER:
            continue
        if stored is None:
            extra.append(short)
        elif not _same(stored, ModelKeys(spec.arch, spec.keys, {}, keys.read).get(short)):
            different.append(name)
    return extra, different


def _same(stored: Any, value: Any) -> bool:
    """Equal values; a list may stand for a number that is the same in all layers."""
    if isinstance(stored, list) != isinstance(value, list):
        stored, value = (one if isinstance(one, list) else [one] for one in (stored, value))
        return len(set(stored)) == len(set(value)) == 1 and _same(stored[0], value[0])
    if isinstance(stored, list):
        return len(stored) == len(value) and all(map(_same, stored, value))
    if isinstance(stored, float) or isinstance(value, float):
        return math.isclose(stored, value, rel_tol=2e-7)
    return bool(stored == value)


def _check_tensors(spec: GGUFModelSpec, shapes: Mapping[str, Shape]) -> None:
    """Raise SourceError unless the rebuilt model's tensors are those of the file."""
    made = {target.tensor: target.shape for targets in spec.targets.values() for target in targets}
    if missing := sorted(shapes.keys() - made.keys() - set(CONSTANTS)):
        raise SourceError(f"it has {format_list(missing)}, which a model of this class does not have")
    for name, shape in made.items():
        if name not in shapes:
            raise SourceError(f"it lacks {name}")
        if shapes[name] != shape:
            raise SourceError(f"{name} has the shape {list(shapes[name])}, but its keys need {list(shape)}")


def _notes(entry: HFClass, spec: GGUFModelSpec, keys: ModelKeys) -> tuple[str, ...]:
    import numpy as np

    notes: list[str] = []
    for name in CONSTANTS:
        stored, made = name in keys.shapes, name in spec.constants
        if stored != made or (stored and not np.allclose(keys.read(name), spec.constants[name], rtol=1e-5)):
            notes.append(WarningText(f"{name} cannot be expressed in config.json: long texts are read otherwise"))
    if keys.get("rope.scaling.type") == "longrope" and CONSTANTS[1] not in keys.shapes:
        notes.append(
            WarningText("the file has longrope scaling without its factors: config.json is written without it")
        )
    if "text_config" in entry.config:
        notes.append(f"{entry.name}: the file holds only the text part; the vision or audio tower is in an mmproj file")
    return tuple(notes)


def _unknown_note(unknown: list[str]) -> list[str]:
    return [f"config.json has no place for {format_list(unknown)} of the GGUF file"] if unknown else []


def _reader(header: GGUFHeader) -> Any:
    def read(name: str) -> np.ndarray:
        return _read_float32(header.tensors[name])

    return read


def _read_float32(stored: GGUFTensorInfo) -> np.ndarray:
    """A small F32 tensor. Raises SourceError for another type or a large one."""
    import numpy as np

    if stored.ggml_type != "F32" or math.prod(stored.shape) > MAX_CONSTANT:
        raise SourceError(f"{stored.name} is {stored.ggml_type} {list(stored.shape)}, but must be a short F32 vector")
    raw = bytearray(stored.nbytes)
    stored.file.read_into(memoryview(raw), stored.offset)
    return np.frombuffer(raw, dtype="<f4").copy()
