"""The recipe's language: which keys there are, and what each may hold."""

from __future__ import annotations

from typing import Any

from mergeforge.recipe.entries import OUT_DTYPES
from mergeforge.recipe.schema import (
    Anything,
    Choice,
    Flag,
    ListOf,
    MapOf,
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
    },
    required=("adapter",),
    short="adapter",
)
_MODEL_REF = Record({"model": _REVISION, "lora": _REVISION}, required=("model",), short="model")
_MODEL = Record(
    {
        "model": _MODEL_REF,
        "adapters": ListOf(_ADAPTER, "adapters folded into this model first"),
        "parameters": _PARAMETERS,
    },
    required=("model",),
    short="model",
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
_OUTPUT = Record(
    {
        "path": Text("the folder to write"),
        "safetensors": Flag("false: only GGUF, no other copy on disk at any time"),
        "shard_size": Size("largest size of one safetensors file, e.g. 5GB"),
        "gguf": ListOf(_GGUF, "GGUF files to write, by their types: q4_k_m, q8_0, f16, ...", lone=True),
        "gguf_from": Choice(("float32", "stored"), "what is quantised: the merged float32 values, or them as stored"),
        "gguf_pre": Text("the pre-tokenizer's name in GGUF, where its structure does not tell"),
        "name": Text("what the model is called in GGUF file names and metadata (default: the folder's name)"),
        "adapter": Anything(),
        "publish": Anything(),
    }
)
_FIELDS: dict[str, Shape] = {
    "merge_method": Text("fold, linear, slerp, ties, ...: see `mergeforge list methods`"),
    "base_model": _MODEL_REF,
    "models": ListOf(_MODEL, "the models to merge"),
    "adapters": ListOf(_ADAPTER, "PEFT adapters of base_model"),
    "parameters": _PARAMETERS,
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "tokenizer_source": Text(),
    "random_seed": Whole(0, "seed of dare's random masks (default 0)"),
    "output": _OUTPUT,
    "slices": Anything(),
    "modules": Anything(),
    "tokenizer": Anything(),
    "chat_template": Anything(),
    "name": Anything(),
}
RECIPE = Record(_FIELDS, about="a mergeforge recipe")
# Keys of the recipe's language that this version reads but cannot carry out.
NOT_YET = (
    ("slices",),
    ("modules",),
    ("tokenizer",),
    ("chat_template",),
    ("name",),
    ("output", "adapter"),
    ("output", "publish"),
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mergeforge recipe"} | RECIPE.json()
