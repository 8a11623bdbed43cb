r"""Find the pre-tokenizer of llama.cpp that splits text as a tokenizer.json does: `tokenizer.ggml.pre`.

llama.cpp's converter recognizes about a hundred tokenizers by the hash of a text tokenized with them, so it refuses
every tokenizer that was trimmed, extended or retrained. Here the structure decides: the steps of `pre_tokenizer` become
a list of regexes in a canonical form, which is looked up among the engine's (pre_tokenizer_table.py). Nothing is
guessed: an unknown list is an error, because the engine's `default` would load and then tokenize wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from mergeforge.errors import RecipeError, SourceError, did_you_mean
from mergeforge.gguf.vocab.pre_tokenizer_table import (
    CONTRACTION,
    DIGIT,
    DIGITS,
    GPT2,
    PRE_TOKENIZERS,
    PUNCTUATION,
    PreTokenizer,
)

# Different ways to write the same regex, in tiktoken, tokenizer.json and llama.cpp: (variant, canonical form).
_EQUIVALENT_REGEXES = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTION),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", CONTRACTION),
    (r"\p{N}{1}", r"\p{N}"),
    (r"\/", "/"),
    (r"]?+\p{L}+", r"]?\p{L}+"),  # possessive: no difference before a disjoint class
    (r"]++[\r\n]*", r"]+[\r\n]*"),
)


@dataclass(frozen=True)
class TokenizerTraits:
    """What is known about a tokenizer besides its splits; decides between names with the same splits."""

    family: str = ""  # config.json's model_type
    adds_bos: bool = False
    ignore_merges: bool = False
    clean_spaces: bool | None = None  # None: tokenizer_config.json does not say
    roberta: bool = False


def pre_tokenizer_named(name: str) -> PreTokenizer:
    """The pre-tokenizer that the user chose by name. Raises RecipeError if the engine has none of that name."""
    if name not in PRE_TOKENIZERS:
        hint = did_you_mean(name, PRE_TOKENIZERS) or f"use one of {', '.join(sorted(PRE_TOKENIZERS))}"
        raise RecipeError(f"llama.cpp has no pre-tokenizer {name!r}", hint=hint)
    return PRE_TOKENIZERS[name]


def match_pre_tokenizer(tokenizer: Mapping[str, Any], traits: TokenizerTraits, file: str) -> PreTokenizer:
    """The engine's pre-tokenizer that splits as tokenizer.json does. Raises SourceError if there is none."""
    splits = split_regexes(tokenizer.get("pre_tokenizer"))
    matches = [row for row in PRE_TOKENIZERS.values() if row.splits and row.splits == splits]
    candidates = [
        row for row in matches if not row.only_families or traits.family in row.families or _is_roberta(row, traits)
    ]
    if not candidates:
        shown = "\n".join(f"    {split}" for split in splits) or "    (no pre_tokenizer)"
        raise SourceError(
            f"{file} splits text in a way that no pre-tokenizer of llama.cpp does:\n{shown}",
            hint=f"the most similar ones are {', '.join(_most_similar(splits))}: if this tokenizer was made from one "
            "of them, use --pre NAME",
        )
    return min(candidates, key=lambda row: _mismatch(row, traits))


def unsupported_step_notes(tokenizer: Mapping[str, Any]) -> list[str]:
    """Notes on what tokenizer.json does to a text and llama.cpp's BPE does not.

    NFC is left out: llama.cpp lacks it, but nearly all texts are in NFC already.
    """
    normalizer = tokenizer.get("normalizer") or {}
    types = [step.get("type") for step in normalizer.get("normalizers") or [normalizer]]
    names = [str(name) for name in types if name not in (None, "NFC")]
    notes = [f"tokenizer.json normalizes text ({', '.join(names)}); llama.cpp's BPE does not"] if names else []
    steps = _flatten(tokenizer.get("pre_tokenizer"))
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        notes.append("tokenizer.json puts a space before a text; llama.cpp's BPE does not")
    return notes


def _is_roberta(row: PreTokenizer, traits: TokenizerTraits) -> bool:
    return row.name == "roberta-bpe" and traits.roberta


def _mismatch(row: PreTokenizer, traits: TokenizerTraits) -> int:
    """How much of the tokenizer this name gets wrong. The first name with the smallest mismatch is used.

    A key of its own can correct BOS, so BOS weighs less than merges that the engine would not ignore. Where the engine
    would ignore merges and tokenizer.json does not, the tokenizer is Llama 3's, saved by an old transformers: then BOS
    decides.
    """
    merges = 40 if traits.ignore_merges and not row.ignore_merges else 0
    merges += 10 if row.ignore_merges and not traits.ignore_merges else 0
    bos = 20 if row.bos != traits.adds_bos else 0
    family = 0 if traits.family in row.families or _is_roberta(row, traits) else 5
    return merges + bos + family + (2 if traits.clean_spaces not in (None, row.clean_spaces) else 0)


def split_regexes(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The regexes by which a `pre_tokenizer` splits, in canonical form; a step that is no regex as `<Type ...>`."""
    steps = _flatten(pre_tokenizer)
    splits = tuple(split for step in steps if (split := _split_regex(step)))
    if not any(step.get("type") == "ByteLevel" for step in steps):
        splits += ("<no ByteLevel>",)
    return splits


def _flatten(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a nested Sequence in order."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for child in step.get("pretokenizers") or () for inner in _flatten(child)]


def _split_regex(step: Mapping[str, Any]) -> str:
    """A step as a regex; "" for a step that does not split."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return DIGIT if step.get("individual_digits") else DIGITS
    if kind == "Punctuation" and step.get("behavior", "Isolated") == "Contiguous":
        return PUNCTUATION
    if kind == "Split" and _keeps_all_text(step):
        pattern = step["pattern"]
        return canonical_regex(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
    return "<" + " ".join(f"{key}={value!r}" if key != "type" else str(value) for key, value in step.items()) + ">"


def _keeps_all_text(step: Mapping[str, Any]) -> bool:
    """Whether a Split only cuts: matches are isolated, or the rest is removed (the same if the regex matches all)."""
    return (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))


def canonical_regex(regex: str) -> str:
    """A regex as the table writes it."""
    for variant, canonical in _EQUIVALENT_REGEXES:
        regex = regex.replace(variant, canonical)
    return regex


def _most_similar(splits: tuple[str, ...]) -> list[str]:
    """The names of the three pre-tokenizers with the most similar regexes."""
    text = "\n".join(splits)
    names = {row.splits: row.name for row in reversed(PRE_TOKENIZERS.values()) if row.splits}

    def similarity(candidate: tuple[str, ...]) -> float:
        return SequenceMatcher(None, "\n".join(candidate), text, autojunk=False).ratio()

    return [names[candidate] for candidate in sorted(names, key=similarity, reverse=True)[:3]]
