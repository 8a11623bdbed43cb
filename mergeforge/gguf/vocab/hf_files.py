"""Reading the small files beside a model; whatever is wrong with one is a SourceError that names it."""

from __future__ import annotations

import json
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.io.aux_files import AuxFiles

Files = AuxFiles


def text_of(files: Files, name: str) -> str | None:
    """The text of a file; None when there is no such file."""
    if name not in files:
        return None
    try:
        return files[name].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{files[name]} cannot be read: {error}", hint="copy it from the model again") from error


def object_of(files: Files, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no such file."""
    content = text_of(files, name)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{files[name]} is not JSON: {error}", hint="copy it from the model again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{files[name]} holds a {type(value).__name__}, not an object")
    return value


def content_of(entry: Any) -> str | None:
    """The text of a token as tokenizer_config.json gives it: a string, or an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
