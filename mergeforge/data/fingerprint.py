"""Fingerprints: whether rows, settings, tokenizer and template are those that tokens were made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import xxhash

from mergeforge.data.readers.open import ending_of, files_of
from mergeforge.data.render import Renderer
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.tokenizers import tokenizer_fingerprint
from mergeforge.errors import SourceError

VERSION = 1  # of what the same rows and settings give; raised when that changes


def fingerprint_of(settings: DataSettings, held_out: Sequence[DataSource], renderer: Renderer, also: str = "") -> str:
    """128 bits over everything that the tokens depend on; files count by their content and not by their names.

    `held_out`: the data that `settings.validation` names, where it is a path.
    """
    digest = xxhash.xxh3_128()
    plain = asdict(replace(settings, sources=(), validation=None if held_out else settings.validation))
    parts = [VERSION, plain, renderer.template.jinja, tokenizer_fingerprint(renderer.tokenizer), also]
    digest.update(_bytes(parts))
    for side in (settings.sources, held_out):
        digest.update(_bytes(len(side)))
        for source in side:
            digest.update(_bytes([source.format, dict(source.columns)]))
            _add_rows(digest, source)
    return digest.hexdigest()


def _add_rows(digest: Any, source: DataSource) -> None:
    for row in source.rows or ():
        digest.update(_bytes(row))
    for file in files_of(source):
        if file.path is None:
            continue
        try:
            digest.update(_bytes([ending_of(file.path), file.path.stat().st_size]))
            with open(file.path, "rb") as read:
                while piece := read.read(8 << 20):
                    digest.update(piece)
        except OSError as error:
            raise SourceError(f"{file.name} cannot be read: {error.strerror or error}") from None


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
