"""The tokenizer of a GGUF file, for what needs one of transformers: rows to score, templates of one's own choice."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.data import load_tokenizer
from mergeforge.errors import SourceError
from mergeforge.eval.extras import extra
from mergeforge.eval.llama_logprobs_process import ScoringProcess
from mergeforge.gguf.reader import GGUFHeader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECEIPT = "mergeforge.json"
SAME = 0.99  # of the tokens are spelled alike; the rest is what converters rename (padding, unused ones)
# What tokenizers that are not the same differ on: spaces, lines, digits, accents, other scripts, symbols.
PROBE = "Hello, world!  It's 12345 o'clock.\n\n\tdéjà vu - naïve; 你好, мир 😀 <tag> x=a[0]+1"
_HINT = "--tokenizer FOLDER names the model that the file was made from"


def find_tokenizer(path: Path, header: GGUFHeader, named: str | None) -> PreTrainedTokenizerBase:
    """The one that is named, lies beside the file or belongs to the model it was made from; else one made of the file.

    Raises SourceError where there is none, or one of another vocabulary.
    """
    folders = [path.parent, path.parent.parent, *_made_from(path.parent)]
    beside = [
        str(one) for one in folders if any((one / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    ]
    for folder in [named] if named else beside:
        found = load_tokenizer(folder)
        if _spells_alike(found, header):
            return found
    if named:
        raise SourceError(f"{path} has another vocabulary than the tokenizer of {named}", hint=_HINT)
    return _out_of(path)


def _spells_alike(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> bool:
    names = header.get("tokenizer.ggml.tokens") or ()
    count = min(len(names), len(tokenizer))
    known = tokenizer.convert_ids_to_tokens(list(range(count)))
    alike = sum(one == other for one, other in zip(known, names, strict=False))
    return count > 0 and alike >= SAME * count


def _out_of(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that transformers makes of the file, if it cuts a text as llama.cpp does. Raises SourceError."""
    transformers = extra("transformers", "train")
    try:
        with tempfile.TemporaryDirectory(prefix="mergeforge-tokenizer-") as alone:  # it would read what lies beside
            (Path(alone) / path.name).symlink_to(path.absolute())
            found = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    except Exception as error:  # it reads the vocabularies of some architectures and not of others
        text = f"there is no tokenizer of {path} beside it, and none can be made of it: {error}"
        raise SourceError(text, hint=_HINT) from None
    process = ScoringProcess(path, 1)
    try:
        theirs = process.tokens(PROBE)
    finally:
        process.close()
    if list(found(PROBE, add_special_tokens=False)["input_ids"]) != theirs:
        text = f"there is no tokenizer of {path} beside it, and the one made of it cuts text otherwise than llama.cpp"
        raise SourceError(text, hint=_HINT)
    return found  # type: ignore[no-any-return]


def _made_from(folder: Path) -> list[Path]:
    """The folders that the receipt beside a file names as its inputs."""
    try:
        inputs = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))["inputs"]
        return [Path(one["name"]) for one in inputs]
    except (OSError, ValueError, KeyError, TypeError):
        return []
