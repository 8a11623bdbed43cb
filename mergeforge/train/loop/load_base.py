"""Loads a base model for training: in 4 or 16 bit, frozen or not, with embedding rows for added tokens.

peft.prepare_model_for_kbit_training is not used: it casts embeddings and lm_head to float32, 2 GB for a
Llama 3 8B (peft issue 3265). Everything frozen stays as it is loaded; adapters are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import BitsAndBytesConfig

from mergeforge.errors import SourceError, format_list
from mergeforge.eval.load_transformers import disable_bnb_repack
from mergeforge.eval.model_class import language_model_class
from mergeforge.eval.text_forward import send_text_to_language_model

SAFE = {"use_safetensors": True, "trust_remote_code": False}  # neither pickles nor the model's own Python code
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a base. `dtype`: bf16, fp16 or fp32, to compute in; `device`: torch's name.

    `config`: a config.json to use instead of the folder's.
    """

    folder: str
    dtype: str
    device: str
    quantize: bool
    train_all: bool = False
    attention: str | None = None
    embed_on_cpu: bool = False
    config: Mapping[str, Any] | None = None


def load_base(options: LoadOptions) -> Any:
    """The model (transformers.PreTrainedModel) on its device: frozen, or in float32 when all of it is trained.

    4 bit means NF4 with double quantization. Tensors are quantized one by one as they are read, so host memory stays
    near the quantized size. Raises SourceError for a model that transformers cannot load.
    """
    model_class, config = language_model_class(options.folder)
    _check_quantization(options, config)
    dtype = torch.float32 if options.train_all and options.dtype != "fp16" else DTYPES[options.dtype]
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": options.device}, **SAFE}
    if options.config is not None:
        arguments["config"] = type(config).from_dict(dict(options.config))
    if options.attention:
        arguments["attn_implementation"] = options.attention
    if options.quantize and getattr(config, "quantization_config", None) is None:
        arguments["quantization_config"] = _nf4(options)
    try:
        model, loaded = model_class.from_pretrained(options.folder, output_loading_info=True, **arguments)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise SourceError(f"cannot load {options.folder}: {str(error).splitlines()[0]}") from None
    if missing := sorted(loaded["missing_keys"]):
        text = f"{options.folder} lacks {format_list(missing)}, which transformers would fill with random numbers"
        raise SourceError(text, hint="download it again")
    model.config.use_cache = False
    model.requires_grad_(options.train_all)
    disable_bnb_repack(model)
    send_text_to_language_model(model)
    if options.embed_on_cpu:
        _keep_embedding_on_cpu(model)
    return model


def _check_quantization(options: LoadOptions, config: Any) -> None:
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method and (str(method) != "bitsandbytes" or not options.quantize):
        hint = "train the model that it was quantized from; bitsandbytes 4-bit models work with method: qlora"
        raise SourceError(f"{options.folder} is quantized ({method})", hint=hint)


def _nf4(options: LoadOptions) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[options.dtype],
    )


def _keep_embedding_on_cpu(model: Any) -> None:
    """Move the frozen input embedding to the host: token ids are copied there, and rows are copied back."""
    embedding = model.get_input_embeddings()
    if embedding.weight is getattr(model.get_output_embeddings(), "weight", None):
        return  # tied: the GPU needs it anyway
    device = embedding.weight.device
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, inputs: (inputs[0].to("cpu"), *inputs[1:]))
    embedding.register_forward_hook(lambda module, inputs, rows: rows.to(device, non_blocking=True))
    # two entries: accelerate does not move a model whose map has several devices
    model.hf_device_map = {"": str(device), "embedding": "cpu"}


def checkpoint_activations(model: Any, *, offload: bool) -> None:
    """Store each layer's input only and recompute the rest; with `offload` the inputs are kept in host memory."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options, offload=offload)
    else:  # transformers before 5.10
        model.gradient_checkpointing_enable(options)


def resize_embeddings(model: Any, tokens: int) -> int:
    """Grow the embedding (and lm_head) to `tokens` rows; returns the number of rows. Never shrinks.

    No padding rows are added: each new row is a token's, so the adapter's token rows describe the whole embedding.
    New rows start at the mean of the old ones, because random rows cost a model its first steps.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if tokens <= rows:
        return int(rows)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            _initialize_rows(layer.weight, rows)
    return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def _initialize_rows(weight: Tensor, first: int) -> None:
    weight[first:] = weight[:first].float().mean(0).to(weight.dtype)
