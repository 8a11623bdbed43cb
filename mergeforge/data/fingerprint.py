"""The fingerprint of prepared data: equal rows, settings, tokenizer and template give equal tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import xxhash

from mergeforge.data.readers.base import data_suffix
from mergeforge.data.readers.open import source_files
from mergeforge.data.render import Renderer
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.tokenizers import tokenizer_fingerprint
from mergeforge.errors import SourceError

VERSION = 3  # raise this when the same rows and settings give other tokens


def data_fingerprint(
    settings: DataSettings, held_out: Sequence[DataSource], renderer: Renderer, extra_key: str = ""
) -> str:
    """A 128-bit hash of everything the tokens depend on. Files count by content, not by name.

    held_out: the data that `settings.validation` names, if it is a path.
    """
    digest = xxhash.xxh3_128()
    plain = asdict(replace(settings, sources=(), validation=None if held_out else settings.validation))
    parts = [VERSION, plain, renderer.template.jinja, tokenizer_fingerprint(renderer.tokenizer), extra_key]
    digest.update(_to_json(parts))
    for sources in (settings.sources, held_out):
        digest.update(_to_json(len(sources)))
        for source in sources:
            digest.update(_to_json([source.format, dict(source.columns)]))
            _add_source(digest, source)
    return digest.hexdigest()


def _add_source(digest: Any, source: DataSource) -> None:
    for row in source.rows or ():
        digest.update(_to_json(row))
    for file in source_files(source):
        if file.path is None:
            continue
        try:
            digest.update(_to_json([data_suffix(file.path), file.path.stat().st_size]))
            with open(file.path, "rb") as stream:
                while chunk := stream.read(8 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise SourceError(f"{file.name} cannot be read: {error.strerror or error}") from None


def _to_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
