"""Sentence-transformers models: a folder whose modules.json lists modules, most of which have a folder of their own.

The weights of the first module are the model's and are merged; other modules (pooling, dense layers) are copied.
Source: sentence_transformers.SentenceTransformer._load_sbert_model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.io.aux_files import AuxFiles

MODULES = "modules.json"
_WITHOUT_FILES = ("Normalize",)  # modules that have no settings


def missing_modules(label: str, files: AuxFiles) -> Iterator[WarningText]:
    """Warnings about modules that modules.json lists, and of which the output gets no file."""
    for module in _modules(files):
        path, kind = str(module.get("path") or ""), str(module.get("type")).rpartition(".")[2]
        if path and kind not in _WITHOUT_FILES and not any(name.startswith(f"{path}/") for name in files):
            yield WarningText(f"{MODULES} of {label} lists {path}, which is not copied: sentence-transformers needs it")


def _modules(files: AuxFiles) -> list[Mapping[str, Any]]:
    try:
        modules = json.loads(files[MODULES].read_text(encoding="utf-8")) if MODULES in files else []
    except (ValueError, RecursionError, OSError):
        return []  # copied as it is
    return [module for module in modules if isinstance(module, Mapping)] if isinstance(modules, list) else []
