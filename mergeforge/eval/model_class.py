"""Which of transformers' classes a checkpoint is loaded with: the one with a language model's head that it was saved
from.

Vision-language models are ForConditionalGeneration classes, most of which AutoModelForCausalLM does not know; of some
it loads the text model alone, under names that the checkpoint does not have.
"""

from __future__ import annotations

from typing import Any

from mergeforge.errors import SourceError

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def language_model_class(folder: str) -> tuple[Any, Any]:
    """The Auto class for the model in a folder, and its configuration.

    Raises SourceError for a model that transformers does not know as a decoder with a language model's head, and
    ValueError, OSError or KeyError for a config.json that transformers cannot read.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    known = [auto for name in AUTO_CLASSES if (auto := getattr(transformers, name, None)) and _class_name(auto, config)]
    saved_from = (config.architectures or [""])[0]
    auto_class = next((auto for auto in known if _class_name(auto, config) == saved_from), next(iter(known), None))
    if auto_class is None or getattr(config, "is_encoder_decoder", False):
        hint = "give a decoder with a language model's head, such as Llama, Qwen, Gemma or Mistral"
        raise SourceError(f"{folder} is not a causal language model: its type is {config.model_type}", hint=hint)
    return auto_class, config


def _class_name(auto_class: Any, config: Any) -> str:
    """The name of the class that an Auto class makes for a configuration; "" if it makes none."""
    mapping = auto_class._model_mapping
    return mapping[type(config)].__name__ if type(config) in mapping else ""
