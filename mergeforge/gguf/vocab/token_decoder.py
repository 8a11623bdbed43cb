"""What a tokenizer's decoder makes of one token: tokenizer.json's `decoder`, for a single token.

llama.cpp looks for added tokens in the raw text, so a token that tokenizer.json holds in the spelling
of its vocabulary (`Ġ` for a space) must stand in the file as the text that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mergeforge.gguf.vocab.tokens import SPACE


@lru_cache(maxsize=1)
def bytes_of_letters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def decoded(text: str, decoder: Mapping[str, Any] | None) -> str:
    """One token, decoded; a token that a decoder would not touch stays as it is."""
    kind = (decoder or {}).get("type")
    if decoder is None or kind in (None, "Fuse", "CTC", "BPEDecoder"):
        return text
    if kind == "Sequence":
        for one in decoder.get("decoders") or ():
            text = decoded(text, one)
        return text
    return _simple(text, str(kind), decoder)


def _simple(text: str, kind: str, decoder: Mapping[str, Any]) -> str:
    if kind == "ByteLevel":
        letters = bytes_of_letters()
        whole = all(letter in letters for letter in text)
        return bytes(letters[letter] for letter in text).decode("utf-8", "replace") if whole else text
    if kind == "Replace":
        return _replaced(text, decoder["pattern"], decoder["content"])
    if kind == "ByteFallback":
        found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(found[1], 16)]).decode("utf-8", "replace") if found else text
    if kind == "Strip":
        return _stripped(text, decoder.get("content", " "), decoder.get("start", 0), decoder.get("stop", 0))
    if kind == "Metaspace":
        spaced = text.replace(decoder.get("replacement", SPACE), " ")
        prepends = decoder.get("prepend_scheme", "always" if decoder.get("add_prefix_space", True) else "never")
        return spaced[1:] if prepends != "never" and spaced.startswith(" ") else spaced
    return text


def _replaced(text: str, pattern: Mapping[str, str], content: str) -> str:
    if "String" in pattern:
        return text.replace(pattern["String"], content)
    return re.sub(pattern["Regex"], lambda _: content, text)


def _stripped(text: str, letter: str, start: int, stop: int) -> str:
    for _ in range(start):
        text = text.removeprefix(letter)
    for _ in range(stop):
        text = text.removesuffix(letter)
    return text
