"""Read tokenizer.model, a sentencepiece model, without the sentencepiece or protobuf packages.

The file is a protobuf message. Only what GGUF needs is read. The field numbers are those of sentencepiece_model.proto:
ModelProto {1 pieces, 2 trainer_spec, 3 normalizer_spec}, SentencePiece {1 piece, 2 score, 3 type}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.tokens import NORMAL, USER_DEFINED
from mergeforge.io.aux_files import AuxFile

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class SentencePiece:
    """A token of a sentencepiece model; `token_type` is numbered as in GGUF."""

    text: str
    score: float
    token_type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A sentencepiece model. `algorithm`: UNIGRAM or BPE; `charsmap`: the normalizer's compiled character map."""

    pieces: tuple[SentencePiece, ...]
    algorithm: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: AuxFile) -> SentencePieceModel:
    """Read a sentencepiece model. Raises SourceError."""
    try:
        return _parse_model(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise SourceError(
            f"{path} is not a sentencepiece model: {error}",
            hint="if the file has only a few hundred bytes, it is a Git LFS pointer: download the real file, or delete "
            "the pointer so that tokenizer.json is used",
        ) from error


def _parse_model(data: bytes) -> SentencePieceModel:
    fields = list(_fields(data))
    pieces = tuple(_parse_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
    if not pieces:
        raise ValueError("it contains no pieces")
    trainer, normalizer = (_last_message(fields, number) for number in (2, 3))
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces,
        algorithm=int(trainer.get(3, UNIGRAM)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _parse_piece(data: bytes) -> SentencePiece:
    fields = dict(_fields(data))
    text, token_type = fields.get(1, b""), fields.get(3, NORMAL)
    assert isinstance(text, bytes)
    # llama.cpp's converter writes sentencepiece's own user-defined pieces as normal tokens.
    token_type = NORMAL if token_type == USER_DEFINED else int(token_type)
    return SentencePiece(text.decode("utf-8"), float(fields.get(2, 0.0)), token_type)


def _last_message(fields: list[tuple[int, int | float | bytes]], number: int) -> dict[int, int | float | bytes]:
    """The fields of the last submessage with this number: protobuf lets the last one win."""
    messages = [value for field, value in fields if field == number and isinstance(value, bytes)]
    return dict(_fields(messages[-1])) if messages else {}


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The (number, value) of every field of a protobuf message. Raises ValueError if `data` is not one."""
    offset = 0
    while offset < len(data):
        tag, offset = _varint(data, offset)
        wire_type, number = tag & 7, tag >> 3
        if wire_type == 0:
            value, offset = _varint(data, offset)
            yield number, value
        elif wire_type == 5:
            yield number, struct.unpack_from("<f", data, offset)[0]
            offset += 4
        elif wire_type == 1:
            yield number, struct.unpack_from("<d", data, offset)[0]
            offset += 8
        elif wire_type == 2:
            size, offset = _varint(data, offset)
            if offset + size > len(data):
                raise ValueError("it ends inside a field")
            yield number, data[offset : offset + size]
            offset += size
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {offset}")


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A variable-length integer, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise ValueError(f"a varint before byte {offset} has more than 10 bytes")
