"""Whether the tokenizers of merged models give a token the same id, that is, the same row of the embedding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeforge.errors import MALFORMED_ERRORS
from mergeforge.io.aux_files import AuxFile
from mergeforge.planner.inputs import OpenModel
from mergeforge.planner.mismatches import Mismatches
from mergeforge.planner.tokenizer import tokenizer_files

MOST_MOVED = 0.1  # share of the ids above which an average of the embeddings is meaningless
_TABLES = ("tokenizer.json", "vocab.json", "vocab.txt")  # files whose tokens and ids can be read
_OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json")


def compare_vocabularies(model: OpenModel, reference: OpenModel) -> Mismatches:
    """What contradicts between the tokenizers of two models, if their vocabularies have one size."""
    files, others = tokenizer_files(reference), tokenizer_files(model)
    name = next((name for name in (*_TABLES, *_OPAQUE) if name in files and name in others), None)
    if name is None or _size(model) != _size(reference) or _same(files[name], others[name]):
        return Mismatches()
    if name in _OPAQUE:
        text = f"{model.label} and {reference.label} have different tokenizers ({name} differs)"
        return Mismatches(doubtful=(text,))
    tokens = _tokens(files[name])
    moved = _moved(tokens, _tokens(others[name]))
    if not moved:
        return Mismatches()
    number, token, other_token = moved[0]
    example = f"id {number} is {other_token!r} in {model.label} and {token!r} in {reference.label}"
    text = f"the vocabularies differ at {len(moved)} of {len(tokens)} ids ({example})"
    text += ": `tokenizer: {source: union}` maps tokens to rows"
    return Mismatches(decisive=(text,)) if len(moved) > MOST_MOVED * len(tokens) else Mismatches(doubtful=(text,))


def _size(model: OpenModel) -> Any:
    """The vocabulary size in config.json."""
    config = model.checkpoint.config
    inner = config.get("text_config")
    return (inner if isinstance(inner, Mapping) else config).get("vocab_size")


def _same(file: AuxFile, other: AuxFile) -> bool:
    if isinstance(file, Path) and isinstance(other, Path) and file.stat().st_size != other.stat().st_size:
        return False
    return file.read_bytes() == other.read_bytes()


def _moved(tokens: Mapping[int, str], others: Mapping[int, str]) -> list[tuple[int, str, str]]:
    """Ids that stand for different tokens: (id, token, other token)."""
    return [(number, text, others[number]) for number, text in tokens.items() if others.get(number, text) != text]


def _tokens(file: AuxFile) -> dict[int, str]:
    """Id -> token of a table; empty for one that cannot be read, which the tokenizer library will refuse too."""
    try:
        text = file.read_text(encoding="utf-8")
        return dict(enumerate(text.splitlines())) if str(file).endswith(".txt") else _of_json(json.loads(text))
    except MALFORMED_ERRORS:
        return {}


def _of_json(value: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of a tokenizer.json (its vocabulary and added tokens) or of a vocab.json."""
    if not isinstance(value.get("model"), Mapping):
        return {int(number): token for token, number in value.items() if isinstance(number, int)}
    vocab = value["model"].get("vocab") or {}
    tokens = {number: token for token, number in vocab.items()} if isinstance(vocab, Mapping) else {}
    if not tokens:
        tokens = {number: str(entry[0]) for number, entry in enumerate(vocab)}
    return tokens | {int(entry["id"]): str(entry["content"]) for entry in value.get("added_tokens") or ()}
