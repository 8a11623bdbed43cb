"""GGUF key/values: exactly typed, in order, before they are written.

The types are those of the GGUF specification (ggml/docs/gguf.md): engines read `u32` where they
expect it and refuse anything else, so a value never gets its type by guessing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# kind -> (number in the file, struct format; "" for those without a fixed size)
KINDS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "text": (8, ""),
    "array": (9, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}


@dataclass(frozen=True)
class Value:
    """A typed value; `items` is the kind of an array's items."""

    kind: str
    value: Any
    items: str = ""


Keys = Mapping[str, Value]  # in the order of the file


def u16(value: int) -> Value:
    return Value("u16", int(value))


def u32(value: int) -> Value:
    return Value("u32", int(value))


def i32(value: int) -> Value:
    return Value("i32", int(value))


def f32(value: float) -> Value:
    return Value("f32", float(value))


def flag(value: bool) -> Value:
    return Value("bool", bool(value))


def text(value: str) -> Value:
    return Value("text", str(value))


def array(items: str, values: Iterable[Any]) -> Value:
    """An array whose items all have one kind."""
    return Value("array", tuple(values), items)


def encoded(keys: Keys) -> bytes:
    """The key/value part of a GGUF header, little-endian."""
    return b"".join(_text(key) + struct.pack("<I", KINDS[value.kind][0]) + _value(value) for key, value in keys.items())


def _value(value: Value) -> bytes:
    if value.kind != "array":
        return _one(value.kind, value.value)
    head = struct.pack("<IQ", KINDS[value.items][0], len(value.value))
    if value.items == "text":
        return head + b"".join(map(_text, value.value))
    return head + struct.pack(f"<{len(value.value)}{KINDS[value.items][1]}", *value.value)


def _one(kind: str, value: Any) -> bytes:
    return _text(value) if kind == "text" else struct.pack("<" + KINDS[kind][1], value)


def _text(value: str | bytes) -> bytes:
    data = value.encode("utf-8") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data
