"""tokenizer.json of BPE vocabularies: byte-level ones, and Gemma 4's over raw UTF-8.

Tokens, merges and special tokens are stored as they are, and `tokenizer.ggml.pre` names the regexes that cut a text
(pre_tokenizer_table.py).
"""

from __future__ import annotations

from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.hf_tokenizer.settings import bpe_model, surrounding_tokens, template_processing, tokenizer_json
from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary
from mergeforge.gguf.vocab.pre_tokenizer_table import DIGIT, DIGITS, GPT2, PRE_TOKENIZERS, PUNCTUATION, PreTokenizer
from mergeforge.gguf.vocab.tokens import SPACE

# What llama.cpp does with a file that names no pre-tokenizer, or "default" (src/llama-vocab.cpp, b11549).
_DEFAULT = PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"))
_HINT = "use the folder of the model that the file was made from"


def bpe_tokenizer(vocabulary: StoredVocabulary) -> tuple[dict[str, Any], list[str]]:
    """Byte-level BPE. Raises SourceError for a vocabulary without merges, and for an unknown pre-tokenizer."""
    _require_merges(vocabulary)
    row, notes = _pre_tokenizer(vocabulary)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    before, after = surrounding_tokens(vocabulary, row.bos, False)
    tokenizer = tokenizer_json(
        vocabulary,
        pre_tokenizer={"type": "Sequence", "pretokenizers": _splits(row)},
        post_processor=template_processing(vocabulary, before, after) if before or after else byte_level,
        decoder=byte_level | {"trim_offsets": True},
        model=bpe_model(vocabulary, [list(merge) for merge in vocabulary.merges], ignore_merges=row.ignore_merges),
    )
    return tokenizer, notes


def raw_bpe_tokenizer(vocabulary: StoredVocabulary) -> tuple[dict[str, Any], list[str]]:
    """Gemma 4: BPE over raw UTF-8, with U+2581 for a space and tokens for bytes. Raises SourceError."""
    _require_merges(vocabulary)
    before, after = surrounding_tokens(vocabulary, True, False)
    unknown = vocabulary.roles.get("unk")
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    options = {"byte_fallback": True, "fuse_unk": True}
    tokenizer = tokenizer_json(
        vocabulary,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        post_processor=template_processing(vocabulary, before, after),
        decoder={"type": "Sequence", "decoders": steps},
        model=bpe_model(
            vocabulary,
            [list(merge) for merge in vocabulary.merges],
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            **options,
        ),
    )
    return tokenizer, []


def _require_merges(vocabulary: StoredVocabulary) -> None:
    if not vocabulary.merges:
        raise SourceError(
            f"{vocabulary.path} has a BPE vocabulary without merges: text cannot be tokenized", hint=_HINT
        )


def _pre_tokenizer(vocabulary: StoredVocabulary) -> tuple[PreTokenizer, list[str]]:
    """How texts are cut, and notes; an old file names nothing, and its architecture decides."""
    name = vocabulary.get("pre")
    if name is None:
        row = _of_family(str(vocabulary.header.get("general.architecture")))
        text = f"{vocabulary.path.name} names no pre-tokenizer (tokenizer.ggml.pre): {row.name} is used"
        return row, [WarningText(text)]
    if name == "default":
        return _DEFAULT, []
    found = PRE_TOKENIZERS.get(name)
    if found is None or not found.splits:
        text = f"{vocabulary.path}: no tokenizer.json can express the pre-tokenizer {name!r}"
        raise SourceError(text, hint=_HINT)
    return found, []


def _of_family(arch: str) -> PreTokenizer:
    return next((row for row in PRE_TOKENIZERS.values() if arch in row.families and row.splits), _DEFAULT)


def _splits(row: PreTokenizer) -> list[dict[str, Any]]:
    """The steps of tokenizer.json; GPT-2's regex is part of its ByteLevel, wherever that stands."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [byte_level if regex == GPT2 else _split(regex) for regex in row.splits]
    return steps if GPT2 in row.splits else [*steps, byte_level | {"use_regex": False}]


def _split(regex: str) -> dict[str, Any]:
    if regex == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    if regex == PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
