"""Tokenizers of transformers: loading one, and the few facts about it that rendering needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from mergeforge.errors import MissingExtraError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub repo (`owner/name[@revision]`).

    Raises MissingExtraError without transformers, SourceError where there is no tokenizer that it can read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("tokens need transformers", hint="pip install 'mergeforge[train]'") from None
    from pathlib import Path

    if not Path(path).expanduser().exists() and revision is None:
        path, _, after = path.partition("@")
        revision = after or None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # of a dozen kinds: files that are missing, broken, of a class it does not know
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "a folder with tokenizer.json and tokenizer_config.json, or a Hub repo id"
        raise SourceError(f"{path} has no tokenizer that transformers reads: {said}", hint=hint) from None
    return found


@dataclass(frozen=True)
class Tokens:
    """A text's token ids, and the characters that each stands for (None: this tokenizer does not tell)."""

    ids: list[int]
    offsets: Offsets | None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    """Texts as they stand: no BOS, no EOS, nothing cut."""
    fast = bool(tokenizer.is_fast)
    found: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=fast,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    offsets = found["offset_mapping"] if fast else [None] * len(texts)
    return [Tokens(ids, places) for ids, places in zip(found["input_ids"], offsets, strict=True)]


def added_first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before any text by itself (BOS, or none)."""
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens: BOS, EOS, ends of turns, ..."""
    added = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer makes of text, in 128 bits. Padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        facts.pop("padding", None)
        facts.pop("truncation", None)
    else:
        facts = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    named = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    first = added_first(tokenizer)
    text = json.dumps([type(tokenizer).__name__ if backend is None else "", facts, named, first], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
