"""What to write instead of a key that another program has, or that belongs elsewhere in a recipe.

Each table goes from a key that is unknown where it stands to what a message suggests. Only what surely means the same
is listed: no suggestion is better than a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable

_WEIGHT_NAMES = dict.fromkeys(("weights", "scales", "scaling", "strength", "ratio", "lora_scale"), "weight")
ADAPTER_NAMES = {
    **_WEIGHT_NAMES,
    **dict.fromkeys(("scale", "alpha"), "weight"),
    **dict.fromkeys(("path", "name", "lora", "peft", "model", "repo", "repo_id"), "adapter"),
}
MODEL_NAMES = {
    **_WEIGHT_NAMES,
    **{name: f"parameters: {{{name}: ...}}" for name in ("scale", "gamma", "epsilon")},
    **dict.fromkeys(("path", "name", "model_name", "model_name_or_path", "repo", "repo_id"), "model"),
    **dict.fromkeys(("lora", "loras", "peft"), "adapters"),
    **dict.fromkeys(("layers", "layer_ranges"), "layer_range"),
}
OUTPUT_NAMES = {
    **dict.fromkeys(("dir", "folder", "out", "out_path", "output_path", "output_dir"), "path"),
    **dict.fromkeys(("quantize", "quantise", "quantization", "quant", "quants", "type", "types", "format"), "gguf"),
    **dict.fromkeys(("repo", "repo_id", "hub", "push_to_hub"), "publish"),
    "max_shard_size": "shard_size",
}
DTYPE_NAMES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "torch.float32"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double", "torch.float64"), "float64"),
}
# The parameters that methods have in mergekit's examples and in ours.
METHOD_PARAMETERS = (
    *("weight", "density", "normalize", "rescale", "lambda", "gamma", "epsilon", "int8_mask"),
    *("t", "select_topk", "filter_wise", "scale", "max_iter", "tol", "alpha", "eps", "r"),
    *("normalize_weights", "nuslerp_flatten", "nuslerp_row_wise"),
)


def recipe_names(output_keys: Iterable[str]) -> dict[str, str]:
    """The table of a recipe's top level, where keys of its `output` and of `parameters` are often written."""
    in_output = {key: key for key in output_keys} | OUTPUT_NAMES
    return {
        **{name: f"parameters: {{{name}: ...}}" for name in METHOD_PARAMETERS},
        **{name: f"output: {{{key}: ...}}" for name, key in in_output.items() if name != "name"},
        **dict.fromkeys(("lora", "loras", "peft", "peft_model"), "adapters"),
        **dict.fromkeys(("base", "model_name_or_path", "pretrained_model"), "base_model"),
        **dict.fromkeys(("precision", "torch_dtype"), "dtype"),
        "layers": "slices",
        "quantization_config": "output: {gguf: ...}",
    }
