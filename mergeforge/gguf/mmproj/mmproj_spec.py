"""The spec of an mmproj file: what the families share.

A rule takes one stored tensor of a tower and returns its targets, or None: then the next rule applies, and in the end
the name map of the gguf package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.architectures import GGUFModelSpec, TensorTarget
from mergeforge.gguf.architectures.tensor_mapping import check_filled
from mergeforge.gguf.key_values import Value
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel

ARCH = "clip"
_NOT_TEXT = "part of the text model"
_SUFFIXES = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")
_MOST_LAYERS = 128  # that gguf-py's names are made for; the converter's number for files with two towers
_POSITIONS = re.compile(r"[va]\.position_embd\.weight")
_OF_BLOCK = re.compile(r"v\.blk\.\d+\.(attn_q|attn_k|attn_v|attn_qkv|attn_out|ffn_up|ffn_gate|ffn_down)\.weight")
_TO_HIDDEN = ("attn_out", "ffn_down")  # the others are computed from hidden_size values
F16_IN_F16 = ("F16", "F32")  # the type in F16 files, and the type in others
ALWAYS_F32 = ("F32", "F32")
ALWAYS_F16 = ("F16", "F16")
FixedTypes = Mapping[str, tuple[str, str]]  # a part of a Hugging Face name -> types


@dataclass(frozen=True)
class TowerTensor:
    """A stored tensor of a tower or projector; `name` is as gguf-py's name map and the rules know it."""

    model: MultimodalModel
    names: Any
    name: str
    info: TensorInfo

    def gguf_name(self, name: str = "") -> str:
        """The GGUF name of a Hugging Face name (default: its own). Raises SourceError where llama.cpp has none."""
        gguf_name = self.names.get_name(name or self.name, try_suffixes=_SUFFIXES)
        if gguf_name is None:
            text = f"{self.info.name}: llama.cpp has no such tensor in the towers of a {self.model.name}"
            raise SourceError(text, hint="drop it from the merge, or update the gguf package: pip install -U gguf")
        return str(gguf_name)

    def tensor(self, tensor: str = "", shape: tuple[int, ...] = (), **options: Any) -> TensorTarget:
        """A target in a GGUF tensor, by default the tensor of its own name and shape."""
        return TensorTarget(tensor or self.gguf_name(), shape or self.info.shape or (1,), **options)

    def third(self, number: int, name: str) -> TensorTarget:
        """One of three equal parts of its rows, as the GGUF tensor of a Hugging Face name."""
        import numpy as np

        count, *rest = self.info.shape
        if count % 3:
            raise SourceError(f"{self.info.name}: {count} rows cannot be divided into q, k and v")
        size = count // 3
        rows = np.arange(number * size, (number + 1) * size, dtype=np.int64)
        return self.tensor(self.gguf_name(name), (size, *rest), rows=rows)


RuleResult = tuple[TensorTarget, ...] | None
Rule = Callable[[TowerTensor], RuleResult]


def make_mmproj(
    model: MultimodalModel,
    keys: Mapping[str, Value],
    *rules: Rule,
    prefixes: Sequence[str],
    required: Sequence[str],
    rename: Callable[[str], str] = str,
    drop: Sequence[str] = (),
    fixed_types: FixedTypes | None = None,
) -> GGUFModelSpec:
    """The spec of the towers of a model.

    Args:
        keys: all of them, with their prefixes, in the converter's order.
        prefixes: how renamed tensors of the towers start; all others belong to the text model.
        required: GGUF tensors that the file must have, without `.weight`.
        rename: changes stored names into those that gguf-py's name map and the rules know.
        drop: parts of the names of tensors that llama.cpp has no use for.
        fixed_types: the types of tensors that do not have the file's type, by a part of their (renamed) names.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, _MOST_LAYERS)
    targets: dict[str, tuple[TensorTarget, ...]] = {}
    dropped: dict[str, str] = {}
    types: dict[str, tuple[str, str]] = {}
    for stored, info in model.tensors.items():
        name = rename(stored)
        if "language_model." in name or not name.startswith(tuple(prefixes)):
            dropped[stored] = _NOT_TEXT
            continue
        if any(part in name for part in drop):
            dropped[stored] = "llama.cpp has no use for it"
            continue
        targets[stored] = _apply_rules(TowerTensor(model, names, name, info), rules)
        for target in targets[stored]:
            if fixed := _fixed_types(target, name, fixed_types or {}):
                types[target.tensor] = fixed
    _check_required(model, targets, required)
    check_filled(model.tensors, targets)
    _check_sizes(model, keys, targets)
    return GGUFModelSpec(ARCH, dict(keys), targets, "", dropped, fixed_types=types)


def split_qkv(parts: Sequence[str], fused: str = "qkv") -> Rule:
    """A rule for q, k and v in one tensor: `parts` stand for `fused` in the names of the three."""

    def rule(stored: TowerTensor) -> RuleResult:
        if f".{fused}." not in stored.name:
            return None
        return tuple(stored.third(number, stored.name.replace(fused, part)) for number, part in enumerate(parts))

    return rule


def split_temporal_patches(stored: TowerTensor) -> RuleResult:
    """A rule for patches of two frames: llama.cpp has a convolution for each of them."""
    import numpy as np

    if not stored.name.endswith("patch_embed.proj.weight") or len(stored.info.shape) != 5:
        return None
    out, channels, frames, height, width = stored.info.shape
    if frames != 2:
        raise SourceError(f"{stored.info.name}: llama.cpp needs patches of 2 frames, not {frames}")
    columns = np.arange(stored.info.columns, dtype=np.int64).reshape(channels, frames, -1)
    shape = (out, channels, height, width)
    return tuple(
        stored.tensor(f"v.patch_embd.weight{ending}", shape, column_order=columns[:, frame].reshape(-1))
        for frame, ending in enumerate(("", ".1"))
    )


def flat_patches(ending: str) -> Rule:
    """A rule for patches as rows of height, width and channel: llama.cpp has a convolution, with channels first."""

    def rule(stored: TowerTensor) -> RuleResult:
        import numpy as np

        if not stored.name.endswith(ending) or len(stored.info.shape) != 2:
            return None
        out, columns = stored.info.shape
        side = math.isqrt(columns // 3)
        order = np.arange(columns, dtype=np.int64).reshape(side, side, 3).transpose(2, 0, 1).reshape(-1)
        return (stored.tensor(shape=(out, 3, side, side), column_order=order),)

    return rule


def column_bias(*names: str) -> Rule:
    """A rule for the biases of convolutions, which llama.cpp has as columns."""

    def rule(stored: TowerTensor) -> RuleResult:
        if not stored.name.endswith(".bias") or not any(name in stored.name for name in names):
            return None
        return (stored.tensor(shape=(*stored.info.shape, 1)),)

    return rule


def _apply_rules(stored: TowerTensor, rules: Sequence[Rule]) -> tuple[TensorTarget, ...]:
    if not stored.info.is_float:
        hint = "use the model's original, unquantized checkpoint"
        raise SourceError(f"{stored.info.name} ({stored.info.dtype}) is quantized", hint=hint)
    for rule in rules:
        if (targets := rule(stored)) is not None:
            return targets
    return (stored.tensor(),)


def _fixed_types(target: TensorTarget, name: str, more: FixedTypes) -> tuple[str, str] | None:
    """The types of a tensor that does not have the file's type."""
    if len(target.shape) <= 1 or target.tensor.endswith("_norm.weight"):
        return ALWAYS_F32
    for part, types in more.items():
        if part in name:
            return types
    if ".patch_embd.weight" in target.tensor or ".patch_merger.weight" in target.tensor:
        return F16_IN_F16
    if not target.tensor.endswith(".weight") or _POSITIONS.fullmatch(target.tensor):
        return ALWAYS_F32
    return None


def _check_required(
    model: MultimodalModel, targets: Mapping[str, tuple[TensorTarget, ...]], required: Sequence[str]
) -> None:
    """Raise SourceError if the towers are not there, or not complete."""
    have = {target.tensor.removesuffix(".weight") for some in targets.values() for target in some}
    if missing := [name for name in required if name not in have]:
        what = "the model has no towers" if not targets else f"no tensor becomes {format_list(missing)}"
        hint = "write the mmproj file from the base model, which has them"
        raise SourceError(f"{what}: an mmproj file of {model.name} needs them", hint=hint)


def _check_sizes(
    model: MultimodalModel, keys: Mapping[str, Value], targets: Mapping[str, tuple[TensorTarget, ...]]
) -> None:
    """Raise SourceError where weights of the vision tower do not have the sizes that config.json states."""
    if "clip.vision.embedding_length" not in keys:
        return
    hidden, patch = (keys[f"clip.vision.{key}"].value for key in ("embedding_length", "patch_size"))
    for name, target in ((name, target) for name, some in targets.items() for target in some):
        block = _OF_BLOCK.fullmatch(target.tensor)
        if target.tensor.startswith("v.patch_embd.weight"):
            fits = target.shape[0] == hidden and math.prod(target.shape[1:]) == 3 * patch**2
        else:
            fits = not block or target.shape[0 if block[1] in _TO_HIDDEN else -1] == hidden
        if not fits:
            shape = model.tensors[name].shape
            text = f"{name} {shape} does not fit hidden_size {hidden} and patch_size {patch} of the vision tower"
            raise SourceError(text, hint="config.json and weights do not match: compare them with the base model")


def blocks(count: int, *parts: str, tower: str = "v") -> list[str]:
    """The names of parts that every block of a tower must have."""
    return [f"{tower}.blk.{block}.{part}" for block in range(count) for part in parts]
