"""A base model ready to be trained: loaded (in 4 bit or 16), frozen or not, with rows for added tokens.

peft.prepare_model_for_kbit_training is not used: it casts embeddings and lm_head to float32, 2 GB for a
Llama 3 8B (peft issue 3265). Everything frozen stays as it is loaded; adapters are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from mergeforge.errors import SourceError
from mergeforge.eval.load_transformers import disable_bnb_repack

NO_CODE = {"use_safetensors": True, "trust_remote_code": False}  # neither pickles nor a model's own Python
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadOptions:
    """How a base is loaded: folder, computing dtype (bf16, fp16, fp32), torch device, attention."""

    folder: str
    dtype: str
    device: str
    quantize: bool
    train_all: bool = False
    attention: str | None = None
    embed_on_cpu: bool = False


def load_base(how: LoadOptions) -> Any:
    """The model (transformers.PreTrainedModel) on its device: frozen, or in float32 where all of it is trained.

    4 bit means NF4 with double quantisation, quantised tensor by tensor while it is read: host memory stays near
    the quantised size. Raises SourceError for a model that transformers cannot load.
    """
    config = _config(how)
    wanted = torch.float32 if how.train_all and how.dtype != "fp16" else DTYPES[how.dtype]
    given: dict[str, Any] = {"dtype": wanted, "device_map": {"": how.device}, **NO_CODE}
    given |= {"attn_implementation": how.attention} if how.attention else {}
    if how.quantize and getattr(config, "quantization_config", None) is None:
        given["quantization_config"] = _nf4(how)
    try:
        model = AutoModelForCausalLM.from_pretrained(how.folder, **given)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{how.folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    model.config.use_cache = False
    model.requires_grad_(how.train_all)
    disable_bnb_repack(model)
    if how.embed_on_cpu:
        _keep_embedding_on_cpu(model)
    return model


def _config(how: LoadOptions) -> Any:
    config = AutoConfig.from_pretrained(how.folder, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method and (str(method) != "bitsandbytes" or not how.quantize):
        hint = "train on the model that it was quantised from; bitsandbytes' 4 bit models work with method: qlora"
        raise SourceError(f"{how.folder} is quantised ({method})", hint=hint)
    return config


def _nf4(how: LoadOptions) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[how.dtype],
    )


def _keep_embedding_on_cpu(model: Any) -> None:
    """A frozen lookup needs no card: ids go to the host, rows come back."""
    embedding = model.get_input_embeddings()
    if embedding.weight is getattr(model.get_output_embeddings(), "weight", None):
        return  # tied: the card needs it anyway
    device = embedding.weight.device
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, given: (given[0].to("cpu"), *given[1:]))
    embedding.register_forward_hook(lambda module, given, rows: rows.to(device, non_blocking=True))
    # two entries: accelerate leaves a model with a map of several devices where it is
    model.hf_device_map = {"": str(device), "embedding": "cpu"}


def checkpoint_activations(model: Any, *, offload: bool) -> None:
    """Keep each layer's input only, and compute the rest again; with `offload` the inputs wait in host memory."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how, offload=offload)
    else:  # transformers before 5.10
        model.gradient_checkpointing_enable(how)


def resize_embeddings(model: Any, tokens: int) -> int:
    """Give embeddings (and lm_head) rows for a vocabulary of `tokens`; the number of rows. Never shrinks.

    No rows are added for alignment: each new row is a token's, so the adapter's token rows alone tell the whole table.
    New rows start at the mean of the old ones: a row at random costs a model its first steps.
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
def _initialize_rows(weight: Tensor, rows: int) -> None:
    weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
