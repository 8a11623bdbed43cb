r"""Which pre-tokenizer of llama.cpp splits text as a tokenizer.json does: `tokenizer.ggml.pre`.

llama.cpp's converter knows about a hundred tokenizers by the hash of a text tokenised with them, so it
refuses every tokenizer that was trimmed, extended or trained anew. Here the structure decides: the
steps of `pre_tokenizer` become a list of regexes in one spelling, and that list is looked up among
those of the engine (mergeforge.gguf.vocab.pre_tokenizer_table). Nothing is guessed: an unknown list is an error,
since the engine's `default` would load and tokenise wrongly.
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

# Spellings of one and the same: tiktoken's, tokenizer.json's and llama.cpp's own.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTION),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", CONTRACTION),
    (r"\p{N}{1}", r"\p{N}"),
    (r"\/", "/"),
    (r"]?+\p{L}+", r"]?\p{L}+"),  # possessive, which changes nothing before a disjoint class
    (r"]++[\r\n]*", r"]+[\r\n]*"),
)


@dataclass(frozen=True)
class Wanted:
    """What is known of a tokenizer besides its splits; decides between names with the same ones."""

    family: str = ""  # config.json's model_type
    adds_bos: bool = False
    ignore_merges: bool = False
    clean_spaces: bool | None = None  # None: tokenizer_config.json does not say
    roberta: bool = False


def asked_for(name: str) -> PreTokenizer:
    """The pre-tokenizer of a name that the user gave; raises RecipeError for one that the engine lacks."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        hint = did_you_mean(name, PRE_TOKENIZERS) or f"one of {known}"
        raise RecipeError(f"llama.cpp has no pre-tokenizer {name!r}", hint=hint)
    return PRE_TOKENIZERS[name]


def pre_tokenizer(tokenizer: Mapping[str, Any], wanted: Wanted, file: str) -> PreTokenizer:
    """The engine's pre-tokenizer that splits as tokenizer.json does. Raises SourceError when none does."""
    splits = splits_of(tokenizer.get("pre_tokenizer"))
    alike = [row for row in PRE_TOKENIZERS.values() if row.splits and row.splits == splits]
    able = [row for row in alike if not row.only_families or wanted.family in row.families or _is(row, wanted)]
    if not able:
        raise SourceError(_unknown(splits, file), hint=_hint(splits))
    return min(able, key=lambda row: _distance(row, wanted))


def unapplied(tokenizer: Mapping[str, Any]) -> list[str]:
    """Notes on what tokenizer.json does to a text that llama.cpp's BPE does not do.

    NFC is not noted: llama.cpp lacks it, and nearly all texts are in it.
    """
    normalizer = tokenizer.get("normalizer") or {}
    found = [one.get("type") for one in normalizer.get("normalizers") or [normalizer]]
    kinds = [str(kind) for kind in found if kind not in (None, "NFC")]
    notes = [f"llama.cpp does not normalise text for BPE, tokenizer.json does: {', '.join(kinds)}"] if kinds else []
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        notes.append("tokenizer.json puts a space before a text, llama.cpp's BPE does not")
    return notes


def _is(row: PreTokenizer, wanted: Wanted) -> bool:
    return row.name == "roberta-bpe" and wanted.roberta


def _distance(row: PreTokenizer, wanted: Wanted) -> int:
    """How much of the tokenizer a name gets wrong; the first of the least is taken.

    A BOS can be set right by a key of its own, so it weighs less than merges that are not ignored.
    Where tokenizer.json does not ignore merges but the engine would, that is Llama 3 saved by an old
    transformers: BOS tells.
    """
    merges = 40 if wanted.ignore_merges and not row.ignore_merges else 0
    merges += 10 if row.ignore_merges and not wanted.ignore_merges else 0
    bos = 20 if row.bos != wanted.adds_bos else 0
    family = 0 if wanted.family in row.families or _is(row, wanted) else 5
    return merges + bos + family + (2 if wanted.clean_spaces not in (None, row.clean_spaces) else 0)


def splits_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The regexes by which a `pre_tokenizer` splits, in one spelling; what is no regex as `<Type ...>`."""
    steps = _steps(pre_tokenizer)
    splits = tuple(split for step in steps if (split := _split(step)))
    if not any(step.get("type") == "ByteLevel" for step in steps):
        splits += ("<no ByteLevel>",)
    return splits


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for one in step.get("pretokenizers") or () for inner in _steps(one)]


def _split(step: Mapping[str, Any]) -> str:
    """One step as a regex; "" for a step that does not split."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return DIGIT if step.get("individual_digits") else DIGITS
    if kind == "Punctuation" and step.get("behavior", "Isolated") == "Contiguous":
        return PUNCTUATION
    if kind == "Split" and _keeps_all(step):
        pattern = step["pattern"]
        return canonical(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
    return "<" + " ".join(f"{key}={value!r}" if key != "type" else str(value) for key, value in step.items()) + ">"


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a Split only cuts: matches isolated, or (the same for a regex that matches all) the rest removed."""
    return (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))


def canonical(regex: str) -> str:
    """A regex in the spelling of the table."""
    for other, ours in _SPELLINGS:
        regex = regex.replace(other, ours)
    return regex


def _unknown(splits: tuple[str, ...], file: str) -> str:
    shown = "\n".join(f"    {split}" for split in splits) or "    (no pre_tokenizer)"
    return f"{file} splits text as no pre-tokenizer of llama.cpp does:\n{shown}"


def _hint(splits: tuple[str, ...]) -> str:
    text = "\n".join(splits)
    rows = {row.splits: row.name for row in reversed(PRE_TOKENIZERS.values()) if row.splits}
    near = sorted(rows, key=lambda row: -SequenceMatcher(None, "\n".join(row), text, autojunk=False).ratio())
    names = ", ".join(rows[one] for one in near[:3])
    return f"the nearest are {names}: if the model was made with one of them, give --pre NAME"
