"""The fingerprint: a hash of everything that decides the bytes of the output.

Memory, threads and the names of folders are not part of it: they do not change any byte. A resumed run must have the
fingerprint of the run that it resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeforge.io.disk import InputFile
from mergeforge.io.file_layout import Layout
from mergeforge.planner.inputs import Inputs
from mergeforge.planner.tokenizer import tokenizer_files
from mergeforge.recipe import Recipe
from mergeforge.tensors.budget import Budget

NUMERICS = 8  # raised when a version computes other bytes from the same recipe
_NO_BYTES = ("output", "stream_inputs")  # recipe keys that decide no byte by themselves


def fingerprint(recipe: Recipe, inputs: Inputs, layouts: Sequence[Layout], budget: Budget) -> str:
    """SHA-256 in hexadecimal over the recipe, the inputs' headers and identities, and the output files' headers."""
    documents = [
        {key: value for key, value in document.items() if key not in _NO_BYTES} for document in recipe.documents
    ]
    output = recipe.output
    headers = [(name, file.header) for layout in layouts for name, file in layout.files.items()]
    facts = {
        "numerics": NUMERICS,
        "recipe": documents if len(documents) > 1 else documents[0],
        "device": budget.device.partition(":")[0],
        "inputs": [
            [*sorted(checkpoint.file_hashes.items()), *_identities(checkpoint.files)]
            for checkpoint in inputs.checkpoints
        ],
        "files": {name: hashlib.sha256(header).hexdigest() for name, header in headers},
        "gguf_from": output.gguf_from,
        "fp8": output.fp8,
        "adapter": output.adapter,
        "tokenizers": _tokenizer_hashes(recipe, inputs),
        "imatrices": [_file_hash(entry.imatrix) for entry in output.gguf if entry.imatrix],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_hashes(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Hashes of the tokenizer files, where these decide which row belongs to which token."""
    if not any(document.tokenizer for document in (recipe, *recipe.stages)):
        return []
    files = [file for model in inputs.stored_models for file in tokenizer_files(model).values()]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _identities(inputs: Sequence[InputFile]) -> list[tuple[int, Any]]:
    """Size and modification time (or etag) of each file."""
    identities = {file.path: file.identity for file in inputs}
    return sorted(((size, changed) for _, size, changed in identities.values()), key=str)
