"""Opens a model in transformers: a folder or Hub repo, in its own dtype or in NF4, with or without a PEFT adapter."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data import load_tokenizer
from mergeforge.errors import MergeforgeError, RecipeError, SourceError
from mergeforge.eval.extras import extra, quiet
from mergeforge.hub.download import fetch
from mergeforge.io.safetensors_header import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTISE = ("none", "nf4")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("adapter_model", "model")
# Kinds that put virtual tokens before a prompt: nothing of the base's weights changes, so there is nothing to merge.
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
_EMBEDDINGS = (".embed_tokens.", ".wte.", ".word_embeddings.", ".lm_head.", ".embed_out.", "embed_in.")


@dataclass(frozen=True)
class Loaded:
    """A model on its device. `rows`: of the base's vocabulary, before an adapter's new tokens made it grow."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Any  # PeftModel around the model, or None
    rows: int
    device: str
    base: str  # where the weights lie


def find(path: str) -> Path:
    """The local folder or file of a path or Hub repo (owner/name[@revision]). Raises SourceError."""
    if Path(path).expanduser().exists():
        return Path(path).expanduser()
    name, _, revision = path.partition("@")
    return fetch(name, revision or None, WEIGHTS).path


def load(
    folder: Path,
    *,
    base: str | None,
    quantise: str,
    device: str,
    adapter: bool = True,
    tokenizer: str | None = None,
) -> Loaded:
    """Load a model folder, or an adapter folder with its base. Raises SourceError, RecipeError, MissingExtraError."""
    if quantise not in QUANTISE:
        raise RecipeError(f"--quantise {quantise}: it is {' or '.join(QUANTISE)}")
    if not (folder / ADAPTER).is_file():
        if not (folder / CONFIG).is_file():
            raise SourceError(
                f"{folder} holds neither {CONFIG} nor {ADAPTER}", hint="give a model, an adapter or a GGUF"
            )
        if base:
            raise RecipeError(f"{folder} is no adapter, so it takes no --base", hint="it is a whole model")
        return _loaded(folder, tokenizer or str(folder), quantise, device)
    found = find(base) if base else base_of(folder)
    if not adapter:
        return _loaded(found, tokenizer or str(found), quantise, device)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    return _adapted(folder, _loaded(found, tokenizer or str(folder if own else found), quantise, device))


def base_of(folder: Path) -> Path:
    """The base model that an adapter's configuration names. Raises SourceError."""
    named = _read(folder / ADAPTER).get("base_model_name_or_path")
    if not named:
        raise SourceError(f"{folder / ADAPTER} names no base model", hint="--base MODEL says which it is")
    beside = folder / str(named)
    try:
        return beside if beside.is_dir() else find(str(named))
    except MergeforgeError as error:
        text = f"the base of {folder} is not to be had: {error}"
        raise SourceError(text, hint="--base MODEL says where it lies") from None


def choose_device(wanted: str) -> str:
    """`auto` is the first of cuda, mps and cpu that is there. Raises RecipeError for one that is not."""
    import torch

    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in known.items() if there)
    if not known.get(wanted.partition(":")[0]):
        raise RecipeError(f"there is no device '{wanted}' here", hint="auto, cpu, cuda, cuda:N or mps")
    return wanted


def keep_gradients_whole(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU at the first forward pass without gradients.

    On processors with AVX512-BF16 the repacked weights have no gradient, give wrong values when they are dequantised,
    and rounded scales (bitsandbytes 0.50, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def hush() -> None:
    """Keep bitsandbytes from advising to install `kernels`, which fetches code from the Hub, when it is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _loaded(folder: Path, tokenizer: str, quantise: str, device: str) -> Loaded:
    transformers = extra("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    hush()
    device = choose_device(device)
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if quantise == "nf4" and not _read(folder / CONFIG).get("quantization_config"):
        options["quantization_config"] = _nf4(transformers)
    if quantise == "nf4" or device != "cpu":
        extra("accelerate", "train")
        options["device_map"] = {"": device}
    with _source_errors(folder), quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options).eval()
    keep_gradients_whole(model)
    rows = int(model.get_input_embeddings().weight.shape[0])
    return Loaded(model, load_tokenizer(tokenizer), None, rows, device, str(folder))


def _nf4(transformers: Any) -> Any:
    import torch

    extra("bitsandbytes", "train")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _adapted(folder: Path, loaded: Loaded) -> Loaded:
    """The adapter in its base; the base's vocabulary grows first where the adapter brings tokens of its own."""
    peft = extra("peft", "train")
    kind = _read(folder / ADAPTER).get("peft_type")
    if kind in PROMPTS:
        raise SourceError(
            f"{folder} is a {kind} adapter, which changes prompts and no weights", hint="it cannot be run"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise SourceError(f"{folder} holds no adapter_model.safetensors", hint="pickled weights are not read here")
    _grow(loaded, max(len(loaded.tokenizer), _rows(folder)))
    with _source_errors(folder), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False).eval()
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing:
        text = f"{folder} is no adapter of {loaded.base}: {missing[0][:300]}"
        raise SourceError(text, hint="--base MODEL says which model it was trained on")
    keep_gradients_whole(adapted)
    return Loaded(loaded.model, loaded.tokenizer, adapted, loaded.rows, loaded.device, loaded.base)


def _grow(loaded: Loaded, rows: int) -> None:
    """Give the vocabulary `rows` rows if it has fewer; new ones start as the mean, so that every load is the same."""
    import torch

    if rows <= loaded.rows:
        return
    with quiet():
        loaded.model.resize_token_embeddings(rows, mean_resizing=False)
    model: Any = loaded.model
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and module.weight.shape[0] == rows:
                module.weight[loaded.rows :] = module.weight[: loaded.rows].float().mean(0).to(module.weight.dtype)


def _rows(folder: Path) -> int:
    """The vocabulary's rows as an adapter stores them; 0 where it stores none."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    tensors = [info for info, _ in read_header(path).tensors.values()]
    held = [info for info in tensors if any(part in info.name for part in _EMBEDDINGS) and ".lora_" not in info.name]
    return max((info.shape[0] for info in held if info.name.endswith(".weight")), default=0)


@contextmanager
def _source_errors(folder: Path) -> Iterator[None]:
    """What transformers and peft raise about files, as our error: they have no type of their own for it."""
    try:
        yield
    except MergeforgeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, ImportError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            text, hint = f"{folder} does not fit on this device", "--quantise nf4, or --device cpu"
            raise SourceError(text, hint=hint) from None
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceError(f"{folder} cannot be loaded: {first.strip()[:500]}") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no object")
    return found
