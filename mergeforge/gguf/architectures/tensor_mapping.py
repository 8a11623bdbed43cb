"""The GGUF targets of every stored tensor: the families' rules, gguf-py's name map, and checks.

A rule takes one stored tensor and returns its targets, or a text (the tensor is dropped, and why), or None: then the
next rule applies, and in the end the name map of the gguf package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget
from mergeforge.gguf.architectures.engine_limits import rope_warnings, sliding_window_warnings
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.key_values import Value

if TYPE_CHECKING:
    import numpy as np

ATTENTION = ("attn_norm", "attn_q|attn_qkv", "attn_k|attn_qkv", "attn_v|attn_qkv", "attn_output")
DECODER = (*ATTENTION, "ffn_norm", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps")
GATED = (*DECODER, "ffn_gate|ffn_gate_exps")

_F32_PARTS = frozenset(
    (
        "ffn_gate_inp",
        "ffn_gate_inp_shexp",
        "position_embd",
        "token_types",
        "ssm_conv1d",
        "ssm_conv1d_q",
        "ssm_conv1d_k",
        "ssm_conv1d_v",
        "shortconv.conv",
        "altup_correct_coef",
        "altup_predict_coef",
        "indexer.proj",
    )
)  # F32 in the converter's files of any type; so are norms, 1-D tensors and tensors that are not weights
_MATRICES = ("token_embd.weight", "output.weight")
_WITHOUT_ARCH = ("general.", "tokenizer.", "diffusion.")  # keys that do not start with the architecture
IN_MMPROJ = "not part of the text model: in llama.cpp it belongs in an mmproj file"
_BUFFERS = (".masked_bias", ".attention.bias", ".attn.bias", ".rotary_emb.inv_freq", "embeddings.position_ids")
_OTHER_MODALITIES = (
    *("mlp", "vit.", "vpm.", "siglip2.", "conformer.", "merger.", "resampler."),
    *("sound_encoder.", "sound_projection.", "speech_embeddings."),
)
_IN_OTHER_MODALITIES = (
    *("visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav.", "projector."),
    *("pre_mm_projector_norm", "image_newline", "view_seperator", "patch_embed", "patch_merger.", "patch_merge_mlp."),
    "model.connector.",
)
_QUANTIZED = re.compile(
    r"(\.SCB|\.absmax|\.quant_map|\.nested_\w+|\.quant_state\.\w+|\.weight_format|_blocks|_scales|\.qweight|\.qzeros"
    r"|\.scales|\.g_idx|\.weight_scale(_inv|_2)?|\.input_scale|\.weight_packed|\.weight_shape|\.weight_zero_point)$"
)


@dataclass(frozen=True)
class HFTensor:
    """A stored tensor; `name` is its own without the prefix that wraps a text model."""

    model: HFModel
    names: Any
    name: str
    info: TensorInfo

    @property
    def layer(self) -> int:
        return int(next(part for part in self.name.split(".") if part.isdecimal()))

    @property
    def is_bias(self) -> bool:
        return self.name.endswith(".bias")

    def gguf_name(self, name: str = "") -> str:
        """The GGUF name of a Hugging Face name (default: its own). Raises SourceError where llama.cpp has none."""
        gguf_name = self.names.get_name(name or self.name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise SourceError(
                f"{self.info.name}: llama.cpp has no such tensor in a {self.model.name}",
                hint="check num_hidden_layers and 'architectures' in config.json, or drop the tensor from the merge",
            )
        return str(gguf_name)

    def tensor(self, tensor: str = "", shape: tuple[int, ...] = (), **options: Any) -> TensorTarget:
        """A target in a GGUF tensor, by default the tensor of its own name and shape."""
        tensor, shape = tensor or self.gguf_name(), shape or self.info.shape or (1,)
        return TensorTarget(tensor, shape, f32=stays_f32(tensor, shape), **options)

    def block_tensor(self, part: str, shape: tuple[int, ...] = (), **options: Any) -> TensorTarget:
        """A target in `blk.<its layer>.<part>.weight` or, for a bias, `.bias`."""
        kind = "bias" if self.is_bias else "weight"
        return self.tensor(f"blk.{self.layer}.{part}.{kind}", shape, **options)

    def rows_per_part(self, heads: int) -> int:
        """Rows of each of `heads` equal parts. Raises SourceError where the rows cannot be divided."""
        if heads <= 0 or self.info.rows % heads:
            raise SourceError(
                f"{self.info.name}: {self.info.rows} rows cannot be divided into {heads} equal parts",
                hint="config.json and weights do not match: compare the number of heads",
            )
        return self.info.rows // heads


RuleResult = tuple[TensorTarget, ...] | str | None
Rule = Callable[[HFTensor], RuleResult]


def make_spec(
    model: HFModel,
    arch: str,
    keys: Mapping[str, Value],
    *rules: Rule,
    vocab: str,
    required_per_block: Sequence[str] = GATED,
    required: Sequence[str] = ("token_embd", "output_norm"),
    layers: int = 0,
    names_of: str = "",
    rename: Callable[[str], str] = str,
    constants: Mapping[str, np.ndarray] | None = None,
    notes: Iterable[str] = (),
    stacked_order: tuple[str, ...] = (),
) -> GGUFModelSpec:
    """The spec of a model: `keys` get the prefix `arch`, every tensor gets its targets from the rules.

    required_per_block: parts that every block must have; `a|b` means one of them. required: tensors outside of blocks.
    layers: the number of blocks, where it is more than num_hidden_layers. names_of: an architecture whose
    name map is used, for one that the gguf package does not know yet. rename: changes stored names into those that the
    name map and the rules know.
    """
    layers = layers or model.layers
    names = _name_map(names_of or arch, layers)
    places: dict[str, tuple[TensorTarget, ...]] = {}
    dropped: dict[str, str] = {}
    for name, info in model.tensors.items():
        answer = _apply_rules(HFTensor(model, names, rename(canonical_name(name)), info), rules)
        if isinstance(answer, str):
            dropped[name] = answer
        else:
            places[name] = answer
    _check_required(model, places, required_per_block, required, layers)
    check_filled(model.tensors, places)
    full = {key if key.startswith(_WITHOUT_ARCH) else f"{arch}.{key}": keys[key] for key in keys}
    more = (
        *rope_warnings(model, arch, constants or {}),
        *sliding_window_warnings(model, "attention.sliding_window" in keys),
    )
    return GGUFModelSpec(arch, full, places, vocab, dropped, dict(constants or {}), (*notes, *more), stacked_order)


def unused_head(stored: HFTensor) -> RuleResult:
    """A rule of families whose output llama.cpp computes from the embedding (see output_head_notes)."""
    return "llama.cpp uses the embedding as the output of this family" if stored.name == "lm_head.weight" else None


def inside_model(name: str) -> str:
    """The name that a tensor of a model without a head has in the model with one."""
    return f"model.{name}"


def canonical_name(name: str) -> str:
    """The name that the tensor has in a text-only model."""
    if name.endswith("e_score_correction_bias"):
        name = name.removesuffix("_bias") + ".bias"
    return name.replace("language_model.", "")


def stays_f32(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether the converter keeps a tensor in F32 whatever the file's type."""
    if len(shape) < 2 or not tensor.endswith(".weight") or tensor.endswith("_norm.weight"):
        return True
    return re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight") in _F32_PARTS


def _name_map(arch: str, layers: int) -> Any:
    import gguf

    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise SourceError(f"the installed gguf package has no names for '{arch}'", hint="pip install --upgrade gguf")
    kept = dict(gguf.TensorNameMap.block_mappings_cfg)
    try:
        return gguf.get_tensor_name_map(known[arch], layers)
    finally:  # Arctic's map changes the class's table, and with it the maps of all architectures after it
        gguf.TensorNameMap.block_mappings_cfg = kept


def _apply_rules(stored: HFTensor, rules: Sequence[Rule]) -> tuple[TensorTarget, ...] | str:
    name, info = stored.name, stored.info
    if name.endswith(_BUFFERS):
        return "a buffer that llama.cpp computes itself"
    if name.startswith(_OTHER_MODALITIES) or any(part in name for part in _IN_OTHER_MODALITIES):
        return IN_MMPROJ
    if not info.is_float or _QUANTIZED.search(name):
        raise SourceError(
            f"{info.name} ({info.dtype}) is already quantized: GGUF is written from 16- or 32-bit weights",
            hint="use the model's original, unquantized checkpoint",
        )
    for rule in rules:
        if (answer := rule(stored)) is not None:
            return answer
    return (stored.tensor(),)


def _check_required(
    model: HFModel,
    places: Mapping[str, tuple[TensorTarget, ...]],
    needs: Sequence[str],
    needs_once: Sequence[str],
    layers: int,
) -> None:
    have = {place.tensor.rpartition(".")[0] for some in places.values() for place in some}
    wanted = [*needs_once, *(_in_layer(need, layer) for layer in range(layers) for need in needs)]
    unread = any(name.endswith("lm_head.weight") for name in model.tensors.keys() - places.keys())
    if not model.tied and not unread and re.search("ForCausalLM|LMHead|ForConditional", model.name):
        wanted.append("output")
    missing = [need for need in wanted if not have & set(need.split("|"))]
    if missing:
        hint = "the checkpoint is incomplete, or config.json belongs to another model"
        if missing == ["output"]:
            hint = 'there is no lm_head: set "tie_word_embeddings": true in config.json if the embedding is the output'
        raise SourceError(f"no tensor becomes GGUF's {format_list(missing)}", hint=hint)


def _in_layer(need: str, layer: int) -> str:
    return "|".join(f"blk.{layer}.{part}" for part in need.split("|"))


def check_filled(tensors: Mapping[str, TensorInfo], places: Mapping[str, tuple[TensorTarget, ...]]) -> None:
    """Raise SourceError unless every GGUF tensor has one shape, which is possible, and is filled exactly."""
    shapes: dict[str, tuple[int, ...]] = {}
    filled: dict[str, int] = {}
    for name, place in _each_target(places):
        if shapes.setdefault(place.tensor, place.shape) != place.shape:
            raise SourceError(
                f"{name}: shape {place.shape} of {place.tensor}, but others have {shapes[place.tensor]}",
                hint="config.json and weights do not match",
            )
        if place.tensor in _MATRICES and len(place.shape) != 2:
            text = f"{name} has shape {tensors[name].shape}, but {place.tensor} is a matrix"
            raise SourceError(text, hint="the checkpoint is damaged, or config.json belongs to another model")
        filled[place.tensor] = filled.get(place.tensor, 0) + _elements(place, tensors[name])
    for tensor, shape in shapes.items():
        if filled[tensor] != math.prod(shape):
            raise SourceError(
                f"{tensor} {shape} needs {math.prod(shape)} values, but the checkpoint has {filled[tensor]}",
                hint="experts are missing, or config.json belongs to another model",
            )


def _each_target(places: Mapping[str, tuple[TensorTarget, ...]]) -> Iterator[tuple[str, TensorTarget]]:
    return ((name, place) for name, some in places.items() for place in some)


def _elements(place: TensorTarget, info: TensorInfo) -> int:
    rows = info.rows if place.rows is None else len(place.rows)
    if place.column_order is not None:
        return rows * len(place.column_order)
    return rows * len(range(*(place.columns or slice(None)).indices(info.columns)))
