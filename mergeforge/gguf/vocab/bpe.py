"""Byte-level BPE: tokens and merges from tokenizer.json.

The vocabulary writes bytes as GPT-2 does (`Ġ` for a space). llama.cpp searches for added tokens in the raw text, so
these are written decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import NORMAL, SPACE, GGUFTokens, added_token
from mergeforge.tokenizer.hf_files import AddedToken


def bpe_tokens(files: TokenizerFiles) -> GGUFTokens:
    """The tokens of a BPE or WordPiece vocabulary. Raises SourceError if the embedding has too few rows."""
    texts = files.model_texts()
    tokens = GGUFTokens.padding(files.rows)
    for token_id, text in texts.items():
        tokens.put(token_id, text, NORMAL)
    for token_id, token in files.added.items():
        if token_id < files.rows:
            tokens.put(token_id, *_decoded_added_token(token, files.tokenizer.get("decoder")))
        else:
            tokens.notes.append(
                f"tokenizer_config.json names {token.text!r}, which is not in the vocabulary and has no embedding row: "
                "left out"
            )
    return tokens


def _decoded_added_token(token: AddedToken, decoder: Mapping[str, Any] | None) -> tuple[str, int]:
    text = token.text if token.normalized else decode_token(token.text, decoder)
    if "\ufffd" in text:  # one byte of a multi-byte character, which llama.cpp's converter loses
        text = token.text
    return added_token(text, token.special)


def bpe_merges(tokenizer: Mapping[str, Any], file: str) -> list[str]:
    """The merges in order, each as `left right`; a space inside a token becomes U+0120.

    Raises SourceError if there are none.
    """
    merges = tokenizer["model"].get("merges")
    if not merges:
        raise SourceError(
            f"{file} has no merges, so text cannot be tokenized",
            hint="save the tokenizer again with transformers, or copy merges.txt into the model's folder",
        )
    if isinstance(merges[0], str):
        return list(merges)
    return [" ".join(half.replace(" ", "\u0120") for half in merge) for merge in merges]


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself if it is printable, else U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}


def decode_token(text: str, decoder: Mapping[str, Any] | None) -> str:
    """One token, decoded by tokenizer.json's `decoder`. Decoders that only join tokens leave it as it is."""
    kind = (decoder or {}).get("type")
    if decoder is None or kind in (None, "Fuse", "CTC", "BPEDecoder"):
        return text
    if kind == "Sequence":
        for step in decoder.get("decoders") or ():
            text = decode_token(text, step)
        return text
    return _decode_step(text, str(kind), decoder)


def _decode_step(text: str, kind: str, decoder: Mapping[str, Any]) -> str:
    if kind == "ByteLevel":
        alphabet = byte_alphabet()
        is_encoded = all(character in alphabet for character in text)
        return bytes(alphabet[character] for character in text).decode("utf-8", "replace") if is_encoded else text
    if kind == "Replace":
        return _replace(text, decoder["pattern"], decoder["content"])
    if kind == "ByteFallback":
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(byte[1], 16)]).decode("utf-8", "replace") if byte else text
    if kind == "Strip":
        return _strip(text, decoder.get("content", " "), decoder.get("start", 0), decoder.get("stop", 0))
    if kind == "Metaspace":
        spaced = text.replace(decoder.get("replacement", SPACE), " ")
        scheme = decoder.get("prepend_scheme", "always" if decoder.get("add_prefix_space", True) else "never")
        return spaced[1:] if scheme != "never" and spaced.startswith(" ") else spaced
    return text


def _replace(text: str, pattern: Mapping[str, str], content: str) -> str:
    if "String" in pattern:
        return text.replace(pattern["String"], content)
    return re.sub(pattern["Regex"], lambda _: content, text)


def _strip(text: str, character: str, start: int, stop: int) -> str:
    """Remove `character` at most `start` times at the start and `stop` times at the end."""
    for _ in range(start):
        text = text.removeprefix(character)
    for _ in range(stop):
        text = text.removesuffix(character)
    return text
