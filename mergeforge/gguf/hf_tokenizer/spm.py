"""tokenizer.json and tokenizer.model of sentencepiece (BPE) vocabularies.

GGUF has no merges for them: a sentencepiece model joins the two neighbors whose joined piece has the highest score. The
merges of tokenizer.json are all ways to split a piece into two pieces, the highest score first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from mergeforge.gguf.hf_tokenizer.settings import bpe_model, surrounding_tokens, template_processing, tokenizer_json
from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary
from mergeforge.gguf.vocab.sentencepiece import BPE
from mergeforge.gguf.vocab.tokens import NORMAL, SPACE, UNKNOWN

_LONGEST = 64  # characters of a piece that is split; longer ones are runs of one character in known vocabularies


def spm_tokenizer(vocabulary: StoredVocabulary) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json as transformers converts it from a sentencepiece model."""
    before, after = surrounding_tokens(vocabulary, True, False)
    unknown = vocabulary.roles.get("unk", _first_unknown(vocabulary))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    adds_space = vocabulary.get("add_space_prefix") is not False
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []),
    ]
    tokenizer = tokenizer_json(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": [prepend, replace]} if adds_space else replace,
        post_processor=template_processing(vocabulary, before, after) if before or after else None,
        decoder={"type": "Sequence", "decoders": steps},
        model=bpe_model(
            vocabulary,
            _merges(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    )
    return tokenizer, []


def _first_unknown(vocabulary: StoredVocabulary) -> int | None:
    return next((index for index, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)


def _merges(vocabulary: StoredVocabulary) -> list[list[str]]:
    """All pairs of pieces that make a piece, in the order in which sentencepiece joins them."""
    pieces = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == NORMAL
    }
    found = [
        (-vocabulary.scores[index], index, pieces[piece[:at]], pieces[piece[at:]])
        for piece, index in pieces.items()
        for at in range(1, min(len(piece), _LONGEST))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    found.sort()
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, _, left, right in found]


def sentencepiece_file(vocabulary: StoredVocabulary) -> bytes:
    """tokenizer.model: the field numbers are those of sentencepiece_model.proto."""
    pieces = (
        _message(1, _text(1, token) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    )
    return (
        b"".join(pieces) + _message(2, b"".join(_trainer(vocabulary))) + _message(3, b"".join(_normalizer(vocabulary)))
    )


def _trainer(vocabulary: StoredVocabulary) -> Iterator[bytes]:
    """TrainerSpec: algorithm, number of pieces, byte fallback, special tokens."""
    yield from (_number(3, BPE), _number(4, len(vocabulary.tokens)), _number(35, 1))
    unknown = vocabulary.roles.get("unk", _first_unknown(vocabulary))
    ids = {"unk": unknown} | {role: vocabulary.roles.get(role) for role in ("bos", "eos", "pad")}
    for offset, token in enumerate(ids.values()):
        yield _number(40 + offset, -1 if token is None else token)
    for offset, token in enumerate(ids.values()):
        if token is not None:
            yield _text(45 + offset, vocabulary.tokens[token])


def _normalizer(vocabulary: StoredVocabulary) -> Iterator[bytes]:
    """NormalizerSpec: text is kept as it is, but for a space in front."""
    adds_space = vocabulary.get("add_space_prefix") is not False
    yield from (_text(1, "identity"), _number(3, int(adds_space)), _number(4, 0), _number(5, 1))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
