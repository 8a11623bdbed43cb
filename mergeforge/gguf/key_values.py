"""GGUF key/values: typed, and in the order of the file.

The types are those of the GGUF specification (ggml/docs/gguf.md). Engines read, for example, `u32` where they expect it
and refuse any other type, so every value is given its type explicitly.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# kind -> (number in the file, struct format, or "" for types without a fixed size)
VALUE_TYPES: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
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


Keys = Mapping[str, Value]  # by key, in the order of the file


def u16(value: int) -> Value:
    return Value("u16", int(value))


def u32(value: int) -> Value:
    return Value("u32", int(value))


def i32(value: int) -> Value:
    return Value("i32", int(value))


def f32(value: float) -> Value:
    return Value("f32", float(value))


def boolean(value: bool) -> Value:
    return Value("bool", bool(value))


def string(value: str) -> Value:
    return Value("string", str(value))


def array(items: str, values: Iterable[Any]) -> Value:
    """An array whose items all have the kind `items`."""
    return Value("array", tuple(values), items)


def encode_key_values(keys: Keys) -> bytes:
    """The key/value part of a GGUF header, little-endian."""
    return b"".join(
        _string(key) + struct.pack("<I", VALUE_TYPES[value.kind][0]) + _value(value) for key, value in keys.items()
    )


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for bytes of another encoding."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _value(value: Value) -> bytes:
    if value.kind == "string":
        return _string(value.value)
    if value.kind != "array":
        return struct.pack("<" + VALUE_TYPES[value.kind][1], value.value)
    number, form = VALUE_TYPES[value.items]
    head = struct.pack("<IQ", number, len(value.value))
    if value.items == "string":
        return head + b"".join(map(_string, value.value))
    return head + struct.pack(f"<{len(value.value)}{form}", *value.value)


def _string(value: str | bytes) -> bytes:
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data
