"""The steps of every `pre_tokenizer` that llama.cpp can reproduce, by the name that it gets in GGUF."""

from __future__ import annotations

from typing import Any

from mergeforge.gguf.vocab import pre_tokenizer_table as table
from support.tokenizer_folders import BYTE_LEVEL, GPT2_BYTE_LEVEL, split_step

# Names whose tokenizers start a text with BOS -> a family that has one.
WITH_BOS = {"llama-bpe": "llama", "command-r": "cohere", "llama4": "llama4", "tekken": "mistral"}
# Names whose tokenizers look a word up in the vocabulary before they apply merges.
IGNORES_MERGES = ("llama-bpe", "tekken", "youtu", "minicpm5")

_DIGITS = {"type": "Digits", "individual_digits": True}
_RUNS = {"type": "Digits", "individual_digits": False}
_PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}


def _raw(regex: str) -> str:
    """With literal line breaks, as in DeepSeek's tokenizer.json."""
    return regex.replace(r"\r", "\r").replace(r"\n", "\n")


_DEEPSEEK3 = [split_step(r"\p{N}{1,3}"), split_step(table.JAPANESE), split_step(_raw(table.DEEPSEEK3))]
# The steps without the final ByteLevel, if that one does not split.
STEPS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [split_step(table.LLAMA3)],
    "dbrx": [split_step(table.LLAMA3)],
    "qwen2": [split_step(table.QWEN2)],
    "qwen35": [split_step(table.QWEN35)],
    "gpt-2": [GPT2_BYTE_LEVEL],
    "olmo": [GPT2_BYTE_LEVEL],
    "starcoder": [_DIGITS, GPT2_BYTE_LEVEL],
    "command-r": [_DIGITS, GPT2_BYTE_LEVEL],
    "falcon": [_PUNCTUATION, GPT2_BYTE_LEVEL, _RUNS, split_step("[0-9][0-9][0-9]")],
    "deepseek-llm": [
        *map(split_step, ("[\r\n]", table.DEEPSEEK_LETTERS, table.DEEPSEEK_MARKS, r"\s+$", table.CHINESE)),
        _DIGITS,
    ],
    "deepseek-coder": [*map(split_step, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", table.CHINESE)), _DIGITS],
    "deepseek-v3": _DEEPSEEK3,
    "tekken": [split_step(table.TEKKEN)],
    "gpt-4o": [split_step(table.GPT4O, "Removed", True)],
    "llama4": [split_step(table.GPT4O)],
    "bloom": [split_step(table.BLOOM)],
    "viking": [split_step(table.BLOOM), _DIGITS],
    "seed-coder": [split_step(table.SEED_CODER.replace(r"\p{N}|", r"\p{N}{1}|", 1))],
    "bailingmoe": [split_step(r"'(?i:[sdmt]|ll|ve|re)|" + table.BAILING.split("|", 7)[-1])],
    "ufakzeka": [split_step(table.UFAKZEKA)],
    "jais-2": [split_step(table.JAIS2)],
    "exaone-moe": [split_step(table.EXAONE_MOE)],
    "minicpm5": [split_step(table.THREE_DIGITS), split_step(table.MINICPM5)],
    "youtu": [split_step(table.YOUTU_ASIAN), split_step(table.YOUTU)],
    "tiny_aya": [split_step(table.LOOK_AHEAD_THREES), split_step(table.GPT4O)],
    "superbpe": [split_step(table.DIGITS), split_step(r"(?=(\d{3})+(?!\d))")],
}


def pre_tokenizer_steps(name: str) -> list[dict[str, Any]]:
    """All steps of a `pre_tokenizer`, including ByteLevel."""
    steps = STEPS[name]
    return steps if any(step["type"] == "ByteLevel" for step in steps) else [*steps, BYTE_LEVEL]
