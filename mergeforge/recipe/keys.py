"""The keys of a recipe, and the schema of each."""

from __future__ import annotations

from typing import Any

from mergeforge.recipe.equivalents import ADAPTER_NAMES, DTYPE_NAMES, MODEL_NAMES, OUTPUT_NAMES, recipe_names
from mergeforge.recipe.model import OUT_DTYPES
from mergeforge.recipe.schema import (
    Boolean,
    Enum,
    Integer,
    ListOf,
    MapOf,
    Object,
    ParameterValue,
    Pattern,
    Range,
    Schema,
    Size,
    String,
)

ENTRY_PARAMETERS = ("weight", "density")  # may stand on a model or adapter itself, beside its `parameters`
_WEIGHT = ParameterValue("a number, a gradient over the layers, or filters (default 1)")
_DENSITY = ParameterValue("the share of each task vector to keep: a number, a gradient or filters")
_REVISION = Object({"path": String(), "revision": String()}, required=("path",), shorthand="path")
_PARAMETERS = MapOf(ParameterValue(), "the method's parameters: numbers, gradients or filters")
_ADAPTER = Object(
    {
        "adapter": String("a PEFT adapter: a folder or Hub repo id, with an optional @revision"),
        "weight": _WEIGHT,
        "density": _DENSITY,
        "parameters": _PARAMETERS,
        "base_is_residual": Boolean("true: base_model is the residual model that PiSSA, OLoRA, CorDA or LoftQ saved"),
    },
    required=("adapter",),
    shorthand="adapter",
    equivalents=ADAPTER_NAMES,
)
_MODEL_REF = Object(
    {
        "model": _REVISION,
        "lora": _REVISION,
        "override_architecture": String("accepted as mergekit does; it has no effect"),
    },
    required=("model",),
    shorthand="model",
)
_ADAPTERS = ListOf(_ADAPTER, "adapters to fold into this model first")
_MODEL = Object(
    {
        "model": _MODEL_REF,
        "adapters": _ADAPTERS,
        "weight": _WEIGHT,
        "density": _DENSITY,
        "parameters": _PARAMETERS,
    },
    required=("model",),
    shorthand="model",
    equivalents=MODEL_NAMES,
)
_MODELS = ListOf(_MODEL, "the models to merge")
_SOURCE = Object(
    {
        "model": _MODEL_REF,
        "layer_range": Range("the layers to take: [first, last + 1]"),
        "adapters": _ADAPTERS,
        "weight": _WEIGHT,
        "density": _DENSITY,
        "parameters": _PARAMETERS,
    },
    required=("model", "layer_range"),
    equivalents=MODEL_NAMES,
)
_SLICE = Object(
    {
        "sources": ListOf(_SOURCE, "models and the layers to take from each; all the same number of layers"),
        "base_model": _MODEL_REF,
        "parameters": _PARAMETERS,
        "residual_weight": ParameterValue("accepted as mergekit does; it has no effect"),
    },
    required=("sources",),
)
_SLICES = ListOf(_SLICE, "slices of layers, each merged from its sources, stacked in this order")
_MODULE = Object({"models": _MODELS, "slices": _SLICES, "parameters": _PARAMETERS})
_RULE = Object(
    {
        "match": ListOf(
            Pattern(), "regular expressions searched for in tensor names (none: every tensor)", allow_scalar=True
        ),
        "merge_method": String("the merge method for these tensors"),
        "parameters": _PARAMETERS,
        "models": ListOf(_MODEL, "the models to merge for these tensors, instead of the recipe's"),
        "use": _MODEL_REF,
        "drop": Boolean("true: leave these tensors out of the result"),
    },
    description="how to make the tensors that match; the first matching rule applies",
)
_TOKEN_SOURCE = Object(
    {
        "kind": Enum(("zero", "model_token")),
        "model": _MODEL_REF,
        "token": String("the token whose embedding row to use"),
        "token_id": Integer(0, "the id of that token"),
    },
    shorthand="model",
)
_TOKEN = Object(
    {"source": _TOKEN_SOURCE, "force": Boolean("true: use this row in every model, even one that has the token")},
    description="the source of a token's embedding row",
)
_TOKENIZER = Object(
    {
        "source": _MODEL_REF,
        "tokens": MapOf(_TOKEN, "settings for single tokens"),
        "pad_to_multiple_of": Integer(1, "pad the embedding to a multiple of this many rows"),
    }
)
_DTYPE = Enum(tuple(OUT_DTYPES), equivalents=DTYPE_NAMES)
_GGUF = Object(
    {
        "type": String("q4_k_m, q8_0, f16, ...: see `mergeforge list quants`"),
        "imatrix": String("an importance matrix file: GGUF or .dat"),
        "tensor_types": MapOf(String(), "GGUF tensor name (substring or regular expression) -> type"),
        "output_tensor_type": String("the type of output.weight"),
        "token_embedding_type": String("the type of token_embd.weight"),
        "pure": Boolean("true: quantize every tensor to the main type"),
        "split_max_size": Size("maximum size of one file, e.g. 4GB"),
    },
    required=("type",),
    shorthand="type",
)
_JOINED = Object(
    {
        "all": Boolean("true: keep every rank of every adapter, without loss"),
        "rank": Integer(1, "truncate the sum of the adapters to this rank"),
        "energy": ParameterValue("truncate to the smallest rank that keeps this share of the squared change, 0 to 1"),
        "dtype": _DTYPE,
    },
    shorthand="all",
    description="write the adapters as one PEFT adapter: true, or {rank, energy, dtype}",
)
_PUBLISH = Object(
    {
        "repo": String("the Hub repo to upload the result to: owner/name"),
        "private": Boolean("create the repo as private (default true)"),
        "revision": String("the branch to upload to (default main)"),
        "stream": Boolean("true: upload each file when it is finished, then delete it locally to save disk space"),
    },
    required=("repo",),
    shorthand="repo",
)
_OUTPUT = Object(
    {
        "path": String("the output folder"),
        "safetensors": Boolean("false: write only GGUF; no other copy is on disk at any time"),
        "fp8": Boolean("true: store linear weights as FP8 (E4M3) with one scale per block of 128 x 128"),
        "shard_size": Size("maximum size of one safetensors file, e.g. 5GB"),
        "gguf": ListOf(_GGUF, "GGUF files to write, by type: q4_k_m, q8_0, f16, ...", allow_scalar=True),
        "gguf_from": Enum(
            ("float32", "stored"), "quantize the merged float32 values, or the values rounded to the stored dtype"
        ),
        "gguf_pre": String("the name of the GGUF pre-tokenizer, if it cannot be detected"),
        "mmproj": String(
            "also write the vision and audio towers, a file of their own in llama.cpp: f16, bf16, f32, q8_0"
        ),
        "converter": String(
            "`official` or a llama.cpp tree: its converter writes the GGUF files from the merged safetensors"
        ),
        "name": String("the model's name in GGUF file names and metadata (default: the folder's name)"),
        "adapter": _JOINED,
        "publish": _PUBLISH,
    },
    equivalents=OUTPUT_NAMES,
)
_FIELDS: dict[str, Schema] = {
    "merge_method": String("fold, linear, slerp, ties, ...: see `mergeforge list methods`"),
    "base_model": _MODEL_REF,
    "models": _MODELS,
    "adapters": ListOf(_ADAPTER, "PEFT adapters of base_model"),
    "parameters": _PARAMETERS,
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "tokenizer_source": _MODEL_REF,
    "base_numerics": Enum(
        ("original", "dequant_nf4", "dequant_nf4_single"),
        "what adapters are folded into: the tensors as stored, or as QLoRA trained on them (NF4, with or without "
        "double quantization)",
    ),
    "stream_inputs": Boolean("true: read Hub repos remotely, range by range, instead of downloading them"),
    "allow_mismatch": Boolean("true: merge models whose configs or vocabularies contradict each other"),
    "random_seed": Integer(0, "seed of the random masks of dare and della (default 0)"),
    "output": _OUTPUT,
    "slices": _SLICES,
    "modules": MapOf(_MODULE, "parts of a model (text_decoder, vision_tower, encoder, ...), each merged separately"),
    "rules": ListOf(_RULE, "rules for tensors that are made differently; the first matching rule applies"),
    "tokenizer": _TOKENIZER,
    "chat_template": String("auto, a template name (alpaca, chatml, exaone, llama3, mistral), or a Jinja template"),
    "name": String("the name by which later documents in the file refer to this result"),
}
RECIPE = Object(_FIELDS, description="a mergeforge recipe", equivalents=recipe_names(_OUTPUT.fields))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergeforge recipe",
    } | RECIPE.json_schema()
