"""Loads a model in transformers: a folder or Hub repo, in its own dtype or NF4, with or without a PEFT adapter."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.rope import with_positions_of
from mergeforge.core.messages import WarningText
from mergeforge.data import load_tokenizer
from mergeforge.data.tokenizer_check import encoder, find_difference
from mergeforge.errors import MergeforgeError, RecipeError, SourceError
from mergeforge.eval.backend import quiet_transformers, require
from mergeforge.eval.model_class import language_model_class
from mergeforge.eval.text_forward import send_text_to_language_model
from mergeforge.hub.download import fetch
from mergeforge.io.safetensors_header import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZE = ("none", "nf4")
CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
WEIGHT_STEMS = ("adapter_model", "model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# PEFT types that prepend virtual tokens to a prompt and change no weights.
PROMPT_METHODS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
_EMBEDDINGS = (".embed_tokens.", ".wte.", ".word_embeddings.", ".lm_head.", ".embed_out.", "embed_in.")


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device. `base_vocab_size`: rows of the vocabulary before an adapter's new tokens were added.

    `warnings`: whether an adapter's tokenizer reads text differently than its base's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Any  # PeftModel around the model, or None
    base_vocab_size: int
    device: str
    base: str  # where the weights are
    warnings: tuple[WarningText, ...] = ()


def local_path(path: str) -> Path:
    """The local folder or file of a path or Hub repo (owner/name[@revision]). Raises SourceError."""
    if Path(path).expanduser().exists():
        return Path(path).expanduser()
    name, _, revision = path.partition("@")
    return fetch(name, revision or None, WEIGHT_STEMS).path


def load_model(
    folder: Path,
    *,
    base: str | None,
    quantize: str,
    device: str,
    adapter: bool = True,
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load a model folder, or an adapter folder with its base. Raises SourceError, RecipeError, MissingExtraError."""
    if quantize not in QUANTIZE:
        raise RecipeError(f"quantize must be {' or '.join(QUANTIZE)}, not {quantize}")
    if not (folder / ADAPTER_CONFIG).is_file():
        if not (folder / CONFIG).is_file():
            raise SourceError(
                f"{folder} holds neither {CONFIG} nor {ADAPTER_CONFIG}", hint="give a model, an adapter or a GGUF file"
            )
        if base:
            raise RecipeError(f"{folder} is a whole model, not an adapter, so it takes no base")
        return _load_base(folder, tokenizer or str(folder), quantize, device)
    base_folder = local_path(base) if base else base_of(folder)
    if not adapter:
        return _load_base(base_folder, tokenizer or str(base_folder), quantize, device)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    chosen = tokenizer or str(folder if has_tokenizer else base_folder)
    loaded = _load_base(base_folder, chosen, quantize, device, config=_scaled_config(folder, base_folder))
    return replace(_add_adapter(folder, loaded), warnings=_other_tokenizer(folder, loaded))


def _other_tokenizer(folder: Path, loaded: LoadedModel) -> tuple[WarningText, ...]:
    """A warning where an adapter's tokenizer gives other tokens for the same text than its base's."""
    if not any((Path(loaded.base) / name).is_file() for name in TOKENIZER_FILES):
        return ()
    difference = find_difference(encoder(loaded.tokenizer), encoder(load_tokenizer(loaded.base)))
    if difference is None:
        return ()
    text = f"the tokenizer of {folder} reads {difference.text!r} as {list(difference.first)}, "
    text += f"but that of its base {loaded.base} as {list(difference.second)}: one of them is not the model's"
    return (WarningText(text),)


def base_of(folder: Path) -> Path:
    """The base model that an adapter's configuration names. Raises SourceError."""
    name = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise SourceError(f"{folder / ADAPTER_CONFIG} names no base model", hint="name it: --base MODEL")
    relative = folder / str(name)
    try:
        return relative if relative.is_dir() else local_path(str(name))
    except MergeforgeError as error:
        raise SourceError(f"the base of {folder} was not found: {error}", hint="name it: --base MODEL") from None


def choose_device(device: str) -> str:
    """`auto` is the first available of cuda, mps and cpu. Raises RecipeError for a device that is not available."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_available in available.items() if is_available)
    if not available.get(device.partition(":")[0]):
        raise RecipeError(f"the device '{device}' is not available", hint="use auto, cpu, cuda, cuda:N or mps")
    return device


def disable_bnb_repack(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU at the first forward pass without gradients.

    On processors with AVX512-BF16 the repacked weights have no gradient, give wrong values when dequantized, and have
    rounded scales (bitsandbytes 0.50, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def silence_bitsandbytes_hint() -> None:
    """Hide the advice of bitsandbytes, at import, to install `kernels`, which downloads code from the Hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _scaled_config(adapter: Path, base: Path) -> dict[str, Any] | None:
    """The base's config.json with the rotary positions of the one beside an adapter, if there is one."""
    if not (adapter / CONFIG).is_file():
        return None
    config, other = _read_json(base / CONFIG), _read_json(adapter / CONFIG)
    return with_positions_of(config, other) if config.get("model_type") == other.get("model_type") else None


def _load_base(
    folder: Path, tokenizer: str, quantize: str, device: str, config: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Load a whole model. `config`: a config.json to use instead of the folder's."""
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    silence_bitsandbytes_hint()
    device = choose_device(device)
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if quantize == "nf4" and not _read_json(folder / CONFIG).get("quantization_config"):
        options["quantization_config"] = _nf4_config(transformers)
    if quantize == "nf4" or device != "cpu":
        require("accelerate")
        options["device_map"] = {"": device}
    with _as_source_errors(folder), quiet_transformers():
        model_class, own_config = language_model_class(str(folder))
        if config is not None:
            options["config"] = type(own_config).from_dict(dict(config))
        model = model_class.from_pretrained(str(folder), **options).eval()
    disable_bnb_repack(model)
    send_text_to_language_model(model)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    return LoadedModel(model, load_tokenizer(tokenizer), None, vocab_size, device, str(folder))


def _nf4_config(transformers: Any) -> Any:
    import torch

    require("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _add_adapter(folder: Path, loaded: LoadedModel) -> LoadedModel:
    """Add the adapter to its base; the vocabulary is resized first if the adapter has new tokens."""
    peft = require("peft")
    kind = _read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if kind in PROMPT_METHODS:
        raise SourceError(f"{folder} is a {kind} adapter: it changes prompts, not weights, and cannot be loaded here")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SourceError(f"{folder} has no {ADAPTER_WEIGHTS}", hint="pickled weights are not supported here")
    _resize_embeddings(loaded, max(len(loaded.tokenizer), _stored_vocab_size(folder)))
    with _as_source_errors(folder), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False).eval()
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missing:
        text = f"{folder} does not fit {loaded.base}: {missing[0][:300]}"
        raise SourceError(text, hint="name the model that it was trained on: --base MODEL")
    disable_bnb_repack(adapted)
    return replace(loaded, adapter=adapted)


def _resize_embeddings(loaded: LoadedModel, vocab_size: int) -> None:
    """Extend the vocabulary to `vocab_size` rows; new rows are the mean of the old ones, so every load is the same."""
    import torch

    old_size = loaded.base_vocab_size
    if vocab_size <= old_size:
        return
    with quiet_transformers():
        loaded.model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model: Any = loaded.model
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and module.weight.shape[0] == vocab_size:
                module.weight[old_size:] = module.weight[:old_size].float().mean(0).to(module.weight.dtype)


def _stored_vocab_size(folder: Path) -> int:
    """Rows of the embeddings that an adapter stores; 0 if it stores none."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return 0
    tensors = [info for info, _ in read_header(path).tensors.values()]
    embeddings = [
        info for info in tensors if any(part in info.name for part in _EMBEDDINGS) and ".lora_" not in info.name
    ]
    return max((info.shape[0] for info in embeddings if info.name.endswith(".weight")), default=0)


@contextmanager
def _as_source_errors(folder: Path) -> Iterator[None]:
    """Turn what transformers and peft raise about files into SourceError; they have no error types for it."""
    try:
        yield
    except MergeforgeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, ImportError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            text, hint = f"{folder} does not fit on this device", "use --quantize nf4, or --device cpu"
            raise SourceError(text, hint=hint) from None
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceError(f"{folder} cannot be loaded: {reason.strip()[:500]}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value
