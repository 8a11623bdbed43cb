"""A transformers tokenizer for a GGUF file, needed to score rows and for chat templates other than the file's own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.file_names import RECEIPT
from mergeforge.data import load_tokenizer
from mergeforge.errors import SourceError
from mergeforge.eval.llama_logprobs_process import ScoringProcess
from mergeforge.gguf.hf_tokenizer import rebuild_tokenizer
from mergeforge.gguf.reader import GGUFHeader, read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_EQUAL_TOKENS = 0.99  # share of equal tokens; converters rename the rest (padding and unused tokens)
# What different tokenizers differ on: spaces, lines, digits, accents, other scripts, symbols.
PROBE = "Hello, world!  It's 12345 o'clock.\n\n\tdéjà vu - naïve; 你好, мир 😀 <tag> x=a[0]+1"
_HINT = "name the folder of the model that the file was made from: --tokenizer FOLDER"


def find_tokenizer(path: Path, header: GGUFHeader, folder: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, beside the file, or of the model it was made from; else one made from the file.

    Raises SourceError if there is none, or if its vocabulary differs from the file's.
    """
    folders = [path.parent, path.parent.parent, *_receipt_inputs(path.parent)]
    with_tokenizer = [
        str(candidate)
        for candidate in folders
        if any((candidate / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    ]
    for candidate in [folder] if folder else with_tokenizer:
        tokenizer = load_tokenizer(candidate)
        if _has_same_tokens(tokenizer, header):
            return tokenizer
    if folder:
        raise SourceError(f"the tokenizer of {folder} has another vocabulary than {path}", hint=_HINT)
    return _tokenizer_from_file(path)


def _has_same_tokens(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> bool:
    names = header.get("tokenizer.ggml.tokens") or ()
    count = min(len(names), len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(list(range(count)))
    equal = sum(token == name for token, name in zip(tokens, names, strict=False))
    return count > 0 and equal >= MIN_EQUAL_TOKENS * count


def _tokenizer_from_file(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer rebuilt from the file, if it tokenizes like llama.cpp. Raises SourceError."""
    try:
        files, _ = rebuild_tokenizer(read_gguf(path), path)
    except SourceError as error:
        text = f"no tokenizer is beside {path}, and none can be made from it: {error}"
        raise SourceError(text, hint=_HINT) from None
    if not files:
        raise SourceError(f"{path} has no vocabulary, and no tokenizer is beside it", hint=_HINT)
    with tempfile.TemporaryDirectory(prefix="mergeforge-tokenizer-") as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes(files[name])
        tokenizer = load_tokenizer(folder)
    process = ScoringProcess(path, 1)
    try:
        expected = process.tokens(PROBE)
    finally:
        process.close()
    if list(tokenizer(PROBE, add_special_tokens=False)["input_ids"]) != expected:
        text = f"no tokenizer is beside {path}, and the one made from it differs from llama.cpp's"
        raise SourceError(text, hint=_HINT)
    return tokenizer


def _receipt_inputs(folder: Path) -> list[Path]:
    """The folders that the receipt beside a file names as its inputs."""
    try:
        inputs = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))["inputs"]
        return [Path(entry["name"]) for entry in inputs]
    except (OSError, ValueError, KeyError, TypeError):
        return []
