"""The `pre_tokenizer` of every tokenizer.json whose structure llama.cpp knows, by the name that it gets."""

from __future__ import annotations

from typing import Any

from mergeforge.gguf.vocab import pre_tokenizer_table as p
from support.tokenizer_folders import BYTE_LEVEL, GPT2_BYTE_LEVEL, split

_DIGITS = {"type": "Digits", "individual_digits": True}
_RUNS = {"type": "Digits", "individual_digits": False}
_PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}


def _raw(regex: str) -> str:
    """With line breaks as themselves, as DeepSeek's has them."""
    return regex.replace(r"\r", "\r").replace(r"\n", "\n")


_DEEPSEEK3 = [split(r"\p{N}{1,3}"), split(p.JAPANESE), split(_raw(p.DEEPSEEK3))]
# What a tokenizer.json says, without the ByteLevel at its end where that does not split.
STEPS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [split(p.LLAMA3)],
    "dbrx": [split(p.LLAMA3)],
    "qwen2": [split(p.QWEN2)],
    "qwen35": [split(p.QWEN35)],
    "gpt-2": [GPT2_BYTE_LEVEL],
    "olmo": [GPT2_BYTE_LEVEL],
    "starcoder": [_DIGITS, GPT2_BYTE_LEVEL],
    "command-r": [_DIGITS, GPT2_BYTE_LEVEL],
    "falcon": [_PUNCTUATION, GPT2_BYTE_LEVEL, _RUNS, split("[0-9][0-9][0-9]")],
    "deepseek-llm": [
        *map(split, ("[\r\n]", p.DEEPSEEK_LETTERS, p.DEEPSEEK_MARKS, r"\s+$", p.CHINESE)),
        _DIGITS,
    ],
    "deepseek-coder": [*map(split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", p.CHINESE)), _DIGITS],
    "deepseek-v3": _DEEPSEEK3,
    "tekken": [split(p.TEKKEN)],
    "gpt-4o": [split(p.GPT4O, "Removed", True)],
    "llama4": [split(p.GPT4O)],
    "bloom": [split(p.BLOOM)],
    "viking": [split(p.BLOOM), _DIGITS],
    "seed-coder": [split(p.SEED_CODER.replace(r"\p{N}|", r"\p{N}{1}|", 1))],
    "bailingmoe": [split(r"'(?i:[sdmt]|ll|ve|re)|" + p.BAILING.split("|", 7)[-1])],
    "ufakzeka": [split(p.UFAKZEKA)],
    "jais-2": [split(p.JAIS2)],
    "exaone-moe": [split(p.EXAONE_MOE)],
    "minicpm5": [split(p.THREE_DIGITS), split(p.MINICPM5)],
    "youtu": [split(p.YOUTU_ASIAN), split(p.YOUTU)],
    "tiny_aya": [split(p.LOOK_AHEAD_THREES), split(p.GPT4O)],
    "superbpe": [split(p.DIGITS), split(r"(?=(\d{3})+(?!\d))")],
}


def steps_of(name: str) -> list[dict[str, Any]]:
    steps = STEPS[name]
    return steps if any(step["type"] == "ByteLevel" for step in steps) else [*steps, BYTE_LEVEL]
