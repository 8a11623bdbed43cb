"""A model whose towers are to be written: the parts of its config, completed, its image processor, and its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.gguf.mmproj.tower_defaults import with_defaults
from mergeforge.io.aux_files import AuxFiles

_PROCESSOR_FILES = {"preprocessor_config.json": "media_proc_cfg", "processor_config.json": "image_processor"}


@dataclass(frozen=True)
class MultimodalModel:
    """A model to write the towers of.

    config: config.json. vision, audio: its parts for the towers, with transformers' defaults; empty if it has none.
    processor: the settings of preprocessor_config.json and processor_config.json. files: those beside the weights.
    """

    name: str
    config: Mapping[str, Any]
    vision: Mapping[str, Any]
    audio: Mapping[str, Any]
    processor: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: AuxFiles

    @staticmethod
    def of(name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], files: AuxFiles) -> MultimodalModel:
        whole = _part(config, "thinker_config") or config
        vision, audio = (with_defaults(_part(whole, key)) for key in ("vision_config", "audio_config"))
        return MultimodalModel(name, config, vision, audio, _processor(files), tensors, files)

    @property
    def text(self) -> Mapping[str, Any]:
        """The config with the keys of its text part at its root."""
        whole = self.config.get("thinker_config") or self.config
        parts = (whole.get(key) for key in ("llm_config", "text_config"))
        return {**self.config, **next((part for part in parts if isinstance(part, Mapping)), {})}

    def with_vision(self, **values: Any) -> MultimodalModel:
        """The model with these values in its vision part."""
        return replace(self, vision={**self.vision, **values})

    def with_audio(self, **values: Any) -> MultimodalModel:
        """The model with these values in its audio part."""
        return replace(self, audio={**self.audio, **values})

    def setting(self, key: str) -> Any:
        """A setting of the image processor. Raises SourceError if it is missing."""
        if self.processor.get(key) is None:
            text = f"preprocessor_config.json has no '{key}', which an mmproj file of {self.name} needs"
            raise SourceError(text, hint="copy the file from the base model")
        return self.processor[key]

    def channel_values(self, key: str) -> list[float]:
        """A setting of three numbers, one for each color channel. Raises SourceError if it is something else."""
        values = self.setting(key)
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            text = f"preprocessor_config.json: {key} must be a list of three numbers, not {values!r:.80}"
            raise SourceError(text, hint="copy the file from the base model")
        return values

    def token_id(self, token: str) -> int:
        """The id of an added token. Raises SourceError if the tokenizer has no such token."""
        for name, entries in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
            added = _read(self.files, name).get(entries) or {}
            pairs = added.items() if isinstance(added, Mapping) else ((entry["id"], entry) for entry in added)
            for number, entry in pairs:
                if entry.get("content") == token:
                    return int(number)
        raise SourceError(f"the tokenizer has no token {token}, which an mmproj file of {self.name} needs")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def find(part: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that a part of the config has. Raises SourceError if it has none of them, or null."""
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if value is None:
        names = " or ".join(f"'{key}'" for key in keys)
        hint = "copy it from the base model"
        raise SourceError(f"config.json: a tower has no {names}, which an mmproj file needs", hint=hint)
    return value


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of config.json; empty if it is missing. Raises SourceError if it is not an object."""
    part = config.get(key) or {}
    if not isinstance(part, Mapping):
        raise SourceError(f"config.json: {key} is not an object", hint="copy it from the base model")
    return part


def _processor(files: AuxFiles) -> dict[str, Any]:
    """The settings of the image processor; those of processor_config.json win."""
    settings: dict[str, Any] = {}
    for name, nested in _PROCESSOR_FILES.items():
        content = _read(files, name)
        settings |= {**content, **(content.get(nested) or {})}
    return settings


def _read(files: AuxFiles, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files[name].read_text("utf-8")) if name in files else {}
    return content
