"""Tiny models written as F32 GGUF and turned back, and why some do not come back under their own names or values."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from mergeforge.operations.convert_gguf import convert, plan_conversion
from mergeforge.operations.convert_model import conversion_recipe
from mergeforge.operations.merge import run
from mergeforge.planner import Options, make_plan

OPTIONS = Options(memory="64MiB", device="cpu", threads=1)

# Models whose GGUF file looks like that of another class: the weights come back under that class's names.
OTHER_NAMES = {
    "llama-body": "a GGUF file does not say that a model has no head: it comes back with a tied one",
    "qwen2-body": "as llama-body",
    "qwen3-body": "as llama-body",
    "qwen35-body": "as llama-body",
    "lfm2-body": "as llama-body",
    "qwen2moe-fused": "experts come back one by one",
    "qwen3moe-fused": "experts come back one by one",
    "ernie-fused": "fused projections of Paddle's checkpoints come back apart",
    "gemma3-vision": "without its tower it is a Gemma3ForCausalLM",
    "qwen35-vision": "without its tower it is a Qwen3_5ForCausalLM",
    "smolvlm": "without its tower it is a Llama",
    "rugpt3xl": "its file is that of a GPT-2, and comes back as one",
    "voxtral": "without its tower it is a Llama",
    "janus": "without its tower it is a Llama",
    "sarashina-vision": "without its tower it is a Llama",
    "qwen2-audio": "without its tower it is a Qwen 2",
    "step37": "without its tower it is a Step 3.5",
    "step3-vl": "without its tower it is a Qwen 3",
}
# Tensors that a GGUF file holds only changed or in part.
CHANGED = {
    "falcon-h1": "multipliers of the config are folded into the weights, and come back as 1",
    "roberta": "rows of the position table that no position has are not in the file, and come back as zeros",
}
# Models that the engine or the converter does not write as they are.
NOT_WRITTEN = {"gemma2-legacy": "its lm_head differs from the embedding"}

# Models whose GGUF file is not turned back yet: they are refused.
ONE_WAY = {
    "nemotron-h-moe": "two layers of its prediction head are one block",
    "nemotron-h-puzzle": "block_configs is a list of mappings",
    "mimo2": "its prediction layers, and heads that differ by layer",
    "step35": "heads that differ by layer",
    "step37": "as step35",
    "kimi-linear": "attention.value_length does not follow from the config values that its tensors do",
    "deci": "block_configs is a list of mappings",
    "deci-7b": "heads that differ by layer",
    "nomic-bert-moe": "its class writes two architectures, of which the other one comes back",
}


def to_gguf(folder: Path, file: Path, type_: str = "f32") -> Path:
    """The model in a folder as a GGUF file."""
    conversion = plan_conversion(str(folder), (type_,), str(file), {"pre": "gpt-2"}, OPTIONS)
    deque(convert(conversion), maxlen=0)
    return file


def from_gguf(file: Path, folder: Path, dtype: str | None = None) -> Path:
    """A GGUF file as a Hugging Face folder."""
    from dataclasses import replace

    return run(make_plan(conversion_recipe(str(file), dtype), replace(OPTIONS, out=folder))).folder
