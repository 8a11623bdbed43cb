"""Metadata that the user sets in a GGUF file, as KEY=VALUE, with the type that the file or the key's readers expect."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.gguf.key_values import VALUE_TYPES, Keys, Value, is_utf8, string

CHAT_TEMPLATE = "tokenizer.chat_template"
# What the tensors and their types decide, and what names all other keys.
_FIXED = ("general.architecture", "general.alignment", "general.quantization_version", "general.file_type")


def read_edits(texts: Iterable[str], keys: Keys) -> dict[str, Value]:
    """The values of `KEY=VALUE` texts. A key that is in `keys` keeps its type.

    A new key gets the type of its value as JSON (true, 5, 0.5, other text), or the one that it is given:
    `KEY=u64:5`. Raises RecipeError.
    """
    edits = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set-metadata {text}: write KEY=VALUE, such as general.name=Aurora")
        if not is_utf8(text):
            raise RecipeError(f"--set-metadata {key}: the text is not UTF-8")
        if key in _FIXED or key.startswith("split."):
            raise RecipeError(f"--set-metadata {key}: this key follows from the tensors", hint="leave it out")
        edits[key] = _value(key, value, keys.get(key))
    return edits


def chat_template(text: str) -> dict[str, Value]:
    """The key of a chat template."""
    return {CHAT_TEMPLATE: string(text)}


def _value(key: str, text: str, old: Value | None) -> Value:
    if old is None:
        kind, colon, rest = text.partition(":")
        return _typed(key, kind, rest) if colon and kind in VALUE_TYPES and kind != "array" else _inferred(key, text)
    if old.kind != "array":
        return _typed(key, old.kind, text)
    items = _parsed(key, text, "a list as JSON")
    if not isinstance(items, list) or (len(items) != len(old.value) and key.startswith("tokenizer.ggml.")):
        error = f"--set-metadata {key}: the value must be a list of {len(old.value)} items, as JSON"
        raise RecipeError(error, hint="see the old one with `mergeforge inspect`")
    return Value("array", tuple(_checked(key, old.items, item) for item in items), old.items)


def _inferred(key: str, text: str) -> Value:
    """The value of a key that the file does not have."""
    try:
        value = _from_json(text)
    except (ValueError, RecursionError):
        return string(text)
    if isinstance(value, bool):
        return Value("bool", value)
    if isinstance(value, int):
        return Value("u32" if value >= 0 else "i32", _checked(key, "u32" if value >= 0 else "i32", value))
    return Value("f32", _checked(key, "f32", value)) if isinstance(value, float) else string(text)


def _typed(key: str, kind: str, text: str) -> Value:
    if kind == "string":
        return Value(kind, text)
    return Value(kind, _checked(key, kind, _parsed(key, text, kind)))


def _parsed(key: str, text: str, expected: str) -> Any:
    try:
        return _from_json(text)
    except (ValueError, RecursionError):
        hint = did_you_mean(text, ("true", "false")) if expected == "bool" else ""
        raise RecipeError(f"--set-metadata {key}: '{text}' is not {_article(expected)}", hint=hint) from None


def _from_json(text: str) -> Any:
    """A JSON value. Raises ValueError, also for NaN and Infinity, which Python's reader accepts."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def _checked(key: str, kind: str, value: Any) -> Any:
    """A value that fits into a type. Raises RecipeError for one that does not."""
    wanted: dict[str, tuple[type, ...]] = {"bool": (bool,), "string": (str,), "f32": (int, float), "f64": (int, float)}
    fits = isinstance(value, wanted.get(kind, (int,))) and (kind == "bool" or not isinstance(value, bool))
    try:
        if fits and kind == "string":
            fits = is_utf8(value)
        elif fits:
            struct.pack("<" + VALUE_TYPES[kind][1], value)
            fits = math.isfinite(value)
    except (struct.error, OverflowError):
        fits = False
    if not fits:
        raise RecipeError(f"--set-metadata {key}: {value!r} is not {_article(kind)}")
    return float(value) if kind in ("f32", "f64") else value


def _article(kind: str) -> str:
    return f"a value of the type {kind}" if kind in VALUE_TYPES else kind
