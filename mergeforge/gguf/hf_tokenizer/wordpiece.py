"""tokenizer.json of WordPiece vocabularies (BERT).

In GGUF the first piece of a word starts with U+2581, and the others have lost their `##`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergeforge.gguf.hf_tokenizer.settings import template_processing, tokenizer_json
from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary
from mergeforge.gguf.vocab.tokens import CONTROL, NORMAL, SPACE, UNUSED

_PREFIX = "##"
_CASED = "bert-bge-large"  # the pre-tokenizer of vocabularies that keep their case


def wordpiece_tokenizer(vocabulary: StoredVocabulary) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json; [CLS] and [SEP] stand around a text."""
    roles = vocabulary.roles
    first, last = roles.get("cls"), roles.get("sep")
    pieces = replace(vocabulary, tokens=tuple(map(_piece, vocabulary.tokens, vocabulary.types)))
    unknown = roles.get("unk")
    tokenizer = tokenizer_json(
        pieces,
        normalizer=_normalizer(vocabulary),
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template_processing(pieces, [] if first is None else [first], [] if last is None else [last]),
        decoder={"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
        model={
            "type": "WordPiece",
            "unk_token": "[UNK]" if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": 100,
            "vocab": pieces.ids,
        },
    )
    return tokenizer, []


def _piece(token: str, kind: int) -> str:
    if kind in (CONTROL, UNUSED) or (token.startswith("[") and token.endswith("]") and kind != NORMAL):
        return token
    return token.removeprefix(SPACE) if token.startswith(SPACE) else _PREFIX + token


def _normalizer(vocabulary: StoredVocabulary) -> dict[str, Any]:
    lowercase = vocabulary.get("normalizer.lowercase")
    if lowercase is None:
        lowercase = vocabulary.get("pre") != _CASED
    options = {"clean_text": True, "handle_chinese_chars": True, "lowercase": lowercase}
    return {"type": "BertNormalizer", **options, "strip_accents": vocabulary.get("normalizer.strip_accents")}
