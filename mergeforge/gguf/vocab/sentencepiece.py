"""tokenizer.model: a sentencepiece model, which is a protobuf message. Only what GGUF wants is read.

Field numbers are those of sentencepiece_model.proto: ModelProto {1 pieces, 2 trainer_spec,
3 normalizer_spec}, SentencePiece {1 piece, 2 score, 3 type}. Reading them by hand (a varint, a tag,
three wire types) spares a dependency on protobuf and on sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.tokens import NORMAL, USER_DEFINED
from mergeforge.io.aux_files import AuxFile

UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """A token: its text, score and type, the types being GGUF's."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """A sentencepiece model; `charsmap` is the normalizer's compiled map of characters."""

    pieces: tuple[Piece, ...]
    algorithm: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def piece_model(path: AuxFile) -> PieceModel:
    """Read a sentencepiece model. Raises SourceError."""
    try:
        return _model(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise SourceError(
            f"{path} is not a sentencepiece model: {error}",
            hint="a file of a few hundred bytes is a Git LFS pointer: fetch the real one, or delete it to use "
            "tokenizer.json",
        ) from error


def _model(data: bytes) -> PieceModel:
    fields = list(_fields(data))
    pieces = tuple(_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
    if not pieces:
        raise ValueError("it holds no pieces")
    trainer, normalizer = (_last(fields, number) for number in (2, 3))
    charsmap = normalizer.get(2, b"")
    return PieceModel(
        pieces,
        algorithm=int(trainer.get(3, UNIGRAM)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, kind = fields.get(1, b""), fields.get(3, NORMAL)
    assert isinstance(text, bytes)
    # llama.cpp's converter takes sentencepiece's own user-defined pieces for normal ones.
    return Piece(text.decode("utf-8"), float(fields.get(2, 0.0)), NORMAL if kind == USER_DEFINED else int(kind))


def _last(fields: list[tuple[int, int | float | bytes]], wanted: int) -> dict[int, int | float | bytes]:
    found = [value for number, value in fields if number == wanted and isinstance(value, bytes)]
    return dict(_fields(found[-1])) if found else {}


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of every field of a message; raises ValueError at anything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire, number = tag & 7, tag >> 3
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == 1:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it ends inside a field")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"an endless number at byte {at}")
