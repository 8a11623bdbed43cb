"""The recipe's language: which keys there are, and what each may hold."""

from __future__ import annotations

from typing import Any

from mergeforge.recipe.model import OUT_DTYPES
from mergeforge.recipe.schema import (
    Choice,
    Flag,
    ListOf,
    MapOf,
    Pattern,
    Range,
    Record,
    Setting,
    Shape,
    Size,
    Text,
    Whole,
)

_REVISION = Record({"path": Text(), "revision": Text()}, required=("path",), short="path")
_PARAMETERS = MapOf(Setting(), "the method's parameters: numbers, gradients or filters")
_ADAPTER = Record(
    {
        "adapter": Text("a PEFT adapter: a folder or Hub repo id, with optional @revision"),
        "weight": Setting("a number, a gradient over the layers, or filters (default 1)"),
        "parameters": _PARAMETERS,
        "base_is_residual": Flag("true: the base is the residual model that PiSSA, OLoRA, CorDA or LoftQ saved"),
    },
    required=("adapter",),
    short="adapter",
)
_MODEL_REF = Record({"model": _REVISION, "lora": _REVISION}, required=("model",), short="model")
_ADAPTERS = ListOf(_ADAPTER, "adapters folded into this model first")
_MODEL = Record(
    {"model": _MODEL_REF, "adapters": _ADAPTERS, "parameters": _PARAMETERS},
    required=("model",),
    short="model",
)
_MODELS = ListOf(_MODEL, "the models to merge")
_SOURCE = Record(
    {
        "model": _MODEL_REF,
        "layer_range": Range("the layers [first, stop) that it gives"),
        "adapters": _ADAPTERS,
        "parameters": _PARAMETERS,
    },
    required=("model", "layer_range"),
)
_SLICE = Record(
    {
        "sources": ListOf(_SOURCE, "models and the layers that they give, as many each"),
        "base_model": _MODEL_REF,
        "parameters": _PARAMETERS,
    },
    required=("sources",),
)
_SLICES = ListOf(_SLICE, "layers of the models, merged and stacked one on the other")
_MODULE = Record({"models": _MODELS, "slices": _SLICES, "parameters": _PARAMETERS})
_RULE = Record(
    {
        "match": ListOf(Pattern(), "regular expressions, searched for in a tensor's name (none: every one)", lone=True),
        "merge_method": Text("the method for these tensors"),
        "parameters": _PARAMETERS,
        "models": ListOf(_MODEL, "the models that are merged into these tensors, instead of the recipe's"),
        "use": _MODEL_REF,
        "drop": Flag("true: leave these tensors out"),
    },
    about="how the tensors that match are made; the first rule that matches counts",
)
_TOKEN_SOURCE = Record(
    {
        "kind": Choice(("zero", "model_token")),
        "model": _MODEL_REF,
        "token": Text("the token whose row is taken"),
        "token_id": Whole(0, "its number"),
    },
    short="model",
)
_TOKEN = Record(
    {"source": _TOKEN_SOURCE, "force": Flag("for every model, also those that know the token")},
    about="where a token's embedding comes from",
)
_TOKENIZER = Record(
    {
        "source": _MODEL_REF,
        "tokens": MapOf(_TOKEN, "tokens treated on their own"),
        "pad_to_multiple_of": Whole(1, "rows of the embedding are filled up to a multiple of this"),
    }
)
_DTYPE = Choice(tuple(OUT_DTYPES))
_GGUF = Record(
    {
        "type": Text("q4_k_m, q8_0, f16, ...: see `mergeforge list quants`"),
        "imatrix": Text("an importance matrix: GGUF or .dat"),
        "tensor_types": MapOf(Text(), "GGUF tensor name (part or regular expression) -> type"),
        "output_tensor_type": Text("the type of output.weight"),
        "token_embedding_type": Text("the type of token_embd.weight"),
        "pure": Flag("every tensor in the main type"),
        "split_max_size": Size("largest size of one file, e.g. 4GB"),
    },
    required=("type",),
    short="type",
)
_JOINED = Record(
    {
        "all": Flag("true: every rank of every adapter, exactly"),
        "rank": Whole(1, "the sum's best approximation of this rank"),
        "energy": Setting("the smallest rank that holds this share of the squared change, 0 to 1"),
        "dtype": _DTYPE,
    },
    short="all",
    about="the adapters as one PEFT adapter: true, or {rank, energy, dtype}",
)
_PUBLISH = Record(
    {
        "repo": Text("the Hub repo that the result goes to: owner/name"),
        "private": Flag("who sees a repo that is made now (default true)"),
        "revision": Text("the branch (default main)"),
        "stream": Flag("true: each file is sent and removed here when it is finished, and needs no room afterwards"),
    },
    required=("repo",),
    short="repo",
)
_OUTPUT = Record(
    {
        "path": Text("the folder to write"),
        "safetensors": Flag("false: only GGUF, no other copy on disk at any time"),
        "fp8": Flag("true: linear weights as FP8 (E4M3) with a scale for each block of 128 x 128"),
        "shard_size": Size("largest size of one safetensors file, e.g. 5GB"),
        "gguf": ListOf(_GGUF, "GGUF files to write, by their types: q4_k_m, q8_0, f16, ...", lone=True),
        "gguf_from": Choice(("float32", "stored"), "what is quantised: the merged float32 values, or them as stored"),
        "gguf_pre": Text("the pre-tokenizer's name in GGUF, where its structure does not tell"),
        "name": Text("what the model is called in GGUF file names and metadata (default: the folder's name)"),
        "adapter": _JOINED,
        "publish": _PUBLISH,
    }
)
_FIELDS: dict[str, Shape] = {
    "merge_method": Text("fold, linear, slerp, ties, ...: see `mergeforge list methods`"),
    "base_model": _MODEL_REF,
    "models": _MODELS,
    "adapters": ListOf(_ADAPTER, "PEFT adapters of base_model"),
    "parameters": _PARAMETERS,
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "tokenizer_source": _MODEL_REF,
    "base_numerics": Choice(
        ("original", "dequant_nf4", "dequant_nf4_single"),
        "what adapters are folded into: tensors as stored, or as QLoRA trained on them (NF4, with or without double "
        "quantisation)",
    ),
    "stream_inputs": Flag("true: Hub repos are read where they lie, in pieces, and not downloaded"),
    "random_seed": Whole(0, "seed of dare's random masks (default 0)"),
    "output": _OUTPUT,
    "slices": _SLICES,
    "modules": MapOf(_MODULE, "parts of a model (text_decoder, vision_tower, encoder, ...) merged each on its own"),
    "rules": ListOf(_RULE, "tensors that are made otherwise than the rest; the first rule that matches counts"),
    "tokenizer": _TOKENIZER,
    "chat_template": Text("auto, a template's name (alpaca, chatml, exaone, llama3, mistral), or Jinja"),
    "name": Text("what later documents of the file call this one's result"),
}
RECIPE = Record(_FIELDS, about="a mergeforge recipe")


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mergeforge recipe"} | RECIPE.json()
