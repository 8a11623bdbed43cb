"""The tensor names of adapters: which module a key belongs to, and its role there.

PEFT writes `base_model.model.` + the module's path during training + a suffix. It strips adapter names when it
saves; old FSDP and DeepSpeed dumps keep them, and the names of their wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = (
    r"(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag|velora_embed)|modules_to_save|trainable_tokens_delta)"
)
_ADAPTER_NAME = re.compile(_NAMED + r"\.default(?=\.|$)")
_FACTOR = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\.([^.]+)(?:\.weight|\.bias)?$")
KEY_PREFIX = "base_model.model."  # of every key that PEFT writes
_ORIGINAL = ".original_module."  # with a resized vocabulary, PEFT also saves the initial values of modules_to_save
UNUSED = "unused"  # the role of tensors that only training needs
_SAMPLER = ".lora_monteclora_sampler."
# Suffix in the file -> role. A suffix stands before its own suffixes ("lora_B.bias" before "bias").
ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_diag": "diagonal",
    "lora_mid.weight": "middle",
    "lora_a": "mlx_A",
    "lora_b": "mlx_B",
    "lora_velora_embed": UNUSED,
    "diff": "added",
    "diff_b": "added_bias",
    "token_adapter.base_layer.weight": "base_weight",
    "token_adapter.trainable_tokens_delta": "tokens",
    "trainable_tokens_delta": "tokens",
    "base_layer.weight": "base_weight",
    "base_layer.bias": "base_bias",
    "weight": "weight",
    "bias": "bias",
}


@dataclass(frozen=True)
class Key:
    """A parsed key: the module that the tensor changes, and its role there."""

    module: str
    role: str


def adapter_names(names: Iterable[str]) -> list[str]:
    """The names of adapters in the keys of a state_dict() dump: "sft" of lora_A.sft.weight; PEFT strips them."""
    found = dict.fromkeys(match[1] for name in names if (match := _FACTOR.search(name)))
    return [name for name in found if name not in ("weight", "bias")]


def without_adapter_name(name: str, adapter: str) -> str:
    """A key without the name of its adapter."""
    return re.sub(rf"{_NAMED}\.{re.escape(adapter)}(?=\.|$)", r"\1", name)


def clean_path(name: str) -> str:
    """Strip wrappers, adapter names and PEFT's prefix from a key: the module's path and the tensor's name remain."""
    path = _ADAPTER_NAME.sub(r"\1", _WRAPPERS.sub("", name)).removeprefix("module.")
    return path.removeprefix(KEY_PREFIX).removeprefix("base_model.").replace(".modules_to_save.", ".")


def parse_key(name: str) -> Key | None:
    """Return a key's module and role, or None if the suffix is unknown."""
    path = clean_path(name)
    if _ORIGINAL in path:
        path = path.replace(_ORIGINAL, ".")
        module, _, leaf = path.rpartition(".")
        return Key(module, f"original_{leaf}") if leaf in ("weight", "bias") else None
    if _SAMPLER in path:
        return Key(path.partition(_SAMPLER)[0], UNUSED)
    for suffix, role in ROLES.items():
        if path.endswith("." + suffix):
            return Key(path[: -len(suffix) - 1], role)
    return None


def find_tensor(path: str, names: Collection[str]) -> list[str]:
    """The checkpoint's tensors that `path` can mean: the exact name, or names that differ by a prefix.

    A model class with a head and the one without it name the same tensor with and without a leading `model.` or
    `transformer.`: one name must then be a suffix of the other, starting after a dot.
    """
    if path in names:
        return [path]
    if suffixes := [name for name in names if path.endswith("." + name)]:
        return [max(suffixes, key=len)]
    return [name for name in names if name.endswith("." + path)]
