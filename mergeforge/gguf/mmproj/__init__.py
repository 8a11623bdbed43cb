"""How a model's towers and projector become an mmproj file, with which llama.cpp reads images and audio.

One file per family:

    @mmproj("Gemma3ForConditionalGeneration")
    def gemma3(model: MultimodalModel) -> GGUFModelSpec: ...

The classes, keys and names are those of llama.cpp's converter (MmprojModel in conversion/base.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergeforge.core.registry import Registry
from mergeforge.errors import MALFORMED_ERRORS, SourceError, did_you_mean, malformed_as_source_error
from mergeforge.gguf.architectures import GGUFModelSpec

if TYPE_CHECKING:
    from mergeforge.core.tensor_info import TensorInfo
    from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel
    from mergeforge.io.aux_files import AuxFiles

BuildSpec = Callable[["MultimodalModel"], GGUFModelSpec]
MMPROJ_CLASSES: Registry[BuildSpec] = Registry("multimodal class", __name__)


def mmproj(*names: str) -> Callable[[BuildSpec], BuildSpec]:
    """Register a function that builds the mmproj spec of the Hugging Face model classes `names`."""

    def register(function: BuildSpec) -> BuildSpec:
        for name in names:
            MMPROJ_CLASSES.add(name, function)
        return function

    return register


def build_mmproj(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], files: AuxFiles) -> GGUFModelSpec:
    """The GGUF spec of a model's mmproj file.

    Args:
        config: config.json.
        tensors: all tensors of the model; those of the text model are dropped.
        files: the files beside the weights: those of the image processor and of the tokenizer are read.

    Raises SourceError for a model without towers, an unknown class, a missing key or file, and missing tensors.
    """
    from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel

    with malformed_as_source_error("config.json"):
        name = class_name(config)
    if name not in MMPROJ_CLASSES:
        hint = (
            f"{did_you_mean(name, MMPROJ_CLASSES) or ''} llama.cpp's convert_hf_to_gguf.py --mmproj may know it".strip()
        )
        raise SourceError(f"config.json: {name} has no towers that can be written as an mmproj file", hint=hint)
    with malformed_as_source_error("preprocessor_config.json or processor_config.json"):
        model = MultimodalModel.of(name, config, tensors, files)
    try:
        return MMPROJ_CLASSES[name](model)
    except MALFORMED_ERRORS as error:  # a value of the wrong type
        text = f"config.json does not describe the towers of a {name}: {type(error).__name__}: {error}"
        raise SourceError(text, hint="compare it with the original model's config.json") from error


def class_name(config: Mapping[str, Any]) -> str:
    """The class that names the towers, found as the converter does: that of the vision part comes first."""
    part = config.get("vision_config")
    names = (part.get("architectures") if isinstance(part, Mapping) else None) or config.get("architectures")
    if not names:
        raise SourceError("config.json has no 'architectures'", hint="copy it from the base model")
    return str(names[0])
