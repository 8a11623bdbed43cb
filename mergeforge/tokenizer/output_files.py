"""The tokenizer files of the output: the source model's, with the output's added tokens.

A new token is an added token, never part of the model's own vocabulary. So merges, scores and a sentencepiece model
stay valid, and every file is copied except the three that list added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError, format_list
from mergeforge.io.aux_files import AuxFile, AuxFiles, InMemoryFile
from mergeforge.tokenizer.hf_files import read_object
from mergeforge.tokenizer.hf_vocabulary import ModelVocabulary, assign_added_ids, save_again_hint
from mergeforge.tokenizer.output_vocabulary import OutputVocabulary

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.model*",  # tokenizer.model.v3 of Mistral
    "spiece.model",
    "sentencepiece*.model",
    "spm*.model",
    "*.spm",  # source.spm and target.spm of Marian
    "*.tiktoken",
    "tiktoken.model",
    "bpe.codes",
    "vocab.json",
    "vocab-*.json",  # of FSMT
    "vocab.bpe",
    "merges.txt",
    "vocab.txt",
    "dict.txt",
    "normalizer.json",  # of Whisper
    "tekken.json",
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece*.model", "spm*.model", "*.spm")


def tokenizer_files_in(folder: Path) -> dict[str, AuxFile]:
    """The tokenizer files of a model's folder by name."""
    paths = [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def replace_tokenizer_files(files: AuxFiles, tokenizer_files: AuxFiles) -> dict[str, AuxFile]:
    """Return auxiliary files with their tokenizer files replaced by these."""
    return {**{name: file for name, file in files.items() if not is_tokenizer_file(name)}, **tokenizer_files}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer."""
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def output_files(source: ModelVocabulary, output: OutputVocabulary) -> tuple[dict[str, AuxFile], list[str]]:
    """Every tokenizer file of the output, and notes. Raises SourceError if no file can take the new tokens."""
    source_files = source.model.files
    files = {name: source_files[name] for name in source_files if is_tokenizer_file(name)}
    before = {**source.model_ids, **assign_added_ids(source.model_ids, source.added)}
    if before == output.ids and source.added == output.added:
        return files, []
    tokenizer = read_object(source_files, "tokenizer.json")
    if tokenizer is None:
        new = [token for token in output.ids if token not in source.ids]
        raise SourceError(
            f"{source.label} has no tokenizer.json to add tokens to ({format_list(map(repr, new))})",
            hint=save_again_hint(source.model),
        )
    entries = {token: {"id": output.ids[token], "content": token, **flags} for token, flags in output.added.items()}
    changed: dict[str, Mapping[str, Any]] = {
        "tokenizer.json": {**tokenizer, "added_tokens": list(entries.values())},
        "tokenizer_config.json": _tokenizer_config(files, list(entries.values())),
        "added_tokens.json": {token: output.ids[token] for token in output.added},
    }
    files |= {name: json_file(name, value) for name, value in changed.items() if name in files}
    stale = files.pop("tekken.json", None)
    return files, ["tekken.json is left out, because it lacks the new tokens"] if stale else []


def json_file(name: str, value: Mapping[str, Any]) -> InMemoryFile:
    return InMemoryFile(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _tokenizer_config(files: AuxFiles, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json with these added tokens, if it lists any or a slow tokenizer would miss them."""
    config = read_object(files, "tokenizer_config.json") or {}
    is_slow = any(fnmatch(name, pattern) for name in files for pattern in _SENTENCEPIECE)
    if is_slow or "added_tokens_decoder" in config:
        decoder = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        config["added_tokens_decoder"] = decoder
    return config
