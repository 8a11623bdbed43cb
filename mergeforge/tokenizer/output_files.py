"""The tokenizer files of the output: the donor's, with its added tokens as they are now.

A new token is an added token, never a piece of the vocabulary: so merges, scores and a sentencepiece model stay
true, and every file but the three that list added tokens is copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError, listing
from mergeforge.io.aux_files import AuxFiles, InMemoryFile, SideFile
from mergeforge.tokenizer.hf_vocabulary import Vocabulary, added_ids, read_object, save_again
from mergeforge.tokenizer.output_vocabulary import Output

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
)


def files_in(folder: Path) -> dict[str, SideFile]:
    """The tokenizer files of a model's folder by name."""
    found = [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def with_tokenizer(files: AuxFiles, made: AuxFiles) -> dict[str, SideFile]:
    """Side files with these tokenizer files in the place of their own."""
    return {**{name: file for name, file in files.items() if not _is_of_tokenizer(name)}, **made}


def _is_of_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def output_files(donor: Vocabulary, output: Output) -> tuple[dict[str, SideFile], list[str]]:
    """Every tokenizer file of the output, and notes. Raises SourceError where new tokens have no file to go into."""
    given = donor.model.files
    files = {name: given[name] for name in given if _is_of_tokenizer(name)}
    before = {**donor.plain, **added_ids(donor.plain, donor.added)}
    if before == output.ids and donor.added == output.added:
        return files, []
    tokenizer = read_object(given, "tokenizer.json")
    if tokenizer is None:
        new = [token for token in output.ids if token not in donor.ids]
        raise SourceError(
            f"{donor.label} has no tokenizer.json, which tokens could be added to ({listing(map(repr, new))})",
            hint=save_again(donor.model),
        )
    entries = {token: {"id": output.ids[token], "content": token, **flags} for token, flags in output.added.items()}
    made: dict[str, Mapping[str, Any]] = {
        "tokenizer.json": {**tokenizer, "added_tokens": list(entries.values())},
        "tokenizer_config.json": _config(files, list(entries.values())),
        "added_tokens.json": {token: output.ids[token] for token in output.added},
    }
    files |= {name: json_file(name, value) for name, value in made.items() if name in files}
    stale = files.pop("tekken.json", None)
    return files, ["tekken.json is left out: it lacks the new tokens"] if stale else []


def json_file(name: str, value: Mapping[str, Any]) -> InMemoryFile:
    return InMemoryFile(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _config(files: AuxFiles, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json with these added tokens, if it lists any or a slow tokenizer would miss them."""
    config = read_object(files, "tokenizer_config.json") or {}
    if "tokenizer.model" in files or "added_tokens_decoder" in config:
        listed = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        config["added_tokens_decoder"] = listed
    return config
