"""A checkpoint that is to be spelled: its config, completed, and the tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures.hf_config import with_hf_defaults
from mergeforge.gguf.pooling import Pooling

MAX_LAYERS = 1024  # building gguf-py's name map for more takes seconds


@dataclass(frozen=True)
class HFModel:
    """A model to convert.

    name: its Hugging Face class. original_config: config.json as it is. config: with transformers' defaults.
    pooling: how sentence-transformers pools its embeddings, if the folder says so.
    """

    name: str
    original_config: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    pooling: Pooling | None = None

    @staticmethod
    def of(
        name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], pooling: Pooling | None = None
    ) -> HFModel:
        return HFModel(name, config, with_hf_defaults(config), tensors, pooling)

    def find(self, *keys: str) -> Any:
        """The value of the first key that the config has, or None."""
        return next((self.config[key] for key in keys if key in self.config), None)

    def require(self, *keys: str) -> Any:
        """The value of the first key that the config has. Raises SourceError if it has none of them, or null."""
        value = self.find(*keys)
        if value is None:
            names = " or ".join(f"'{key}'" for key in keys)
            raise SourceError(
                f"config.json has no {names}, which {self.name} needs", hint="copy it from the base model"
            )
        return value

    @property
    def layers(self) -> int:
        layers = int(self.require("n_layers", "num_hidden_layers", "n_layer", "num_layers"))
        if not 0 <= layers <= MAX_LAYERS:
            text = f"config.json gives the model {layers} layers"
            raise SourceError(text, hint="copy it from the base model")
        return layers

    @property
    def hidden(self) -> int:
        return int(self.require("hidden_size", "n_embd", "dim"))

    @property
    def heads(self) -> int:
        return int(self.require("num_attention_heads", "n_head", "n_heads"))

    @property
    def kv_heads(self) -> int:
        return int(self.find("num_key_value_heads", "n_kv_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.find("head_dim") or self.hidden // self.heads)

    @property
    def experts(self) -> int:
        return int(self.find("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 0)

    @property
    def tied(self) -> bool:
        """Whether the output may be the embedding; for a model with a text part, the outer config decides."""
        config = self.original_config if "text_config" in self.original_config else self.config
        return config.get("tie_word_embeddings") is not False

    @property
    def rope(self) -> Mapping[str, Any]:
        """rope_parameters, of the whole model or of each attention type."""
        rope: Mapping[str, Any] = self.config["rope_parameters"]
        return rope

    @property
    def full_rope(self) -> Mapping[str, Any]:
        """rope_parameters of layers with full attention."""
        rope: Mapping[str, Any] = self.rope.get("full_attention", self.rope)
        return rope
