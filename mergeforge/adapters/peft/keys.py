"""The dialects of adapter tensor names: which module a key belongs to, and in what role.

PEFT writes `base_model.model.` + the module's path at training time + a suffix (adapter names are
stripped when it saves; old FSDP and DeepSpeed dumps keep them and their wrappers' names).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag|velora_embed)|modules_to_save|trainable_tokens_delta)\.default(?=\.|$)"
)
_ORIGINAL = ".original_module."  # beside a grown vocabulary PEFT also saves what modules_to_save started from
UNUSED = "unused"  # the role of what only training needed
_SAMPLER = ".lora_monteclora_sampler."
# suffix on disk -> role, longest first
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
    "lora_a": "turned_A",
    "lora_b": "turned_B",
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
    """A tensor of an adapter: the module it changes, and its role there."""

    module: str
    role: str


def clean_path(name: str) -> str:
    """A key without what training wrapped around it: the module's path and the tensor's name there."""
    path = _ADAPTER_NAME.sub(r"\1", _WRAPPERS.sub("", name)).removeprefix("module.")
    return path.removeprefix("base_model.model.").removeprefix("base_model.").replace(".modules_to_save.", ".")


def parse_key(name: str) -> Key | None:
    """Module and role of a key, or None where the suffix is unknown."""
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
    """The checkpoint's tensors that `path` can mean: itself, or those that differ by a prefix.

    A model class and its headless twin name the same tensor with and without a leading `model.` or
    `transformer.`; one name must then end in the other, at a dot.
    """
    if path in names:
        return [path]
    if ends := [name for name in names if path.endswith("." + name)]:
        return [max(ends, key=len)]
    return [name for name in names if name.endswith("." + path)]
