"""Tokenizers of transformers: loading one, and the few facts about it that rendering needs."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import xxhash

from mergeforge.core.messages import WarningText
from mergeforge.data.tokenizer_check import tokenizer_of_file
from mergeforge.errors import MissingExtraError, SourceError, pip_install

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.*", "tokenizer.bin")
T = TypeVar("T")
Offsets = list[tuple[int, int]]


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub repo (`owner/name[@revision]`); a folder's reads as its tokenizer.json says.

    Raises MissingExtraError without transformers, SourceError if there is no tokenizer that it can read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("tokenizing needs transformers", hint=pip_install("transformers")) from None
    if not Path(path).expanduser().exists() and revision is None:
        path, _, suffix = path.partition("@")
        revision = suffix or None
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        hint = "copy the tokenizer's files from the model that it was made from"
        text = f"{path} has no tokenizer that transformers can read: there is none of its files"
        raise SourceError(text, hint=hint)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=False)
        tokenizer, warning = tokenizer_of_file(tokenizer, folder)
    except Exception as error:  # of a dozen types: files that are missing, broken, or of an unknown class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "give a folder with tokenizer.json and tokenizer_config.json, or a Hub repo id"
        raise SourceError(f"{path} has no tokenizer that transformers can read: {reason}", hint=hint) from None
    tokenizer.load_warnings = (warning,) if warning else ()
    return tokenizer  # type: ignore[no-any-return]


def load_warnings(tokenizer: PreTrainedTokenizerBase) -> tuple[WarningText, ...]:
    """What load_tokenizer found: whether transformers would read text differently than tokenizer.json says."""
    return getattr(tokenizer, "load_warnings", ())


@dataclass(frozen=True)
class TokenizedText:
    """The token ids of a text. `encoding`: the tokenizer's own result (None: this tokenizer reports no offsets)."""

    ids: list[int]
    encoding: Any = None

    @property
    def offsets(self) -> Offsets | None:
        """[start, stop) of the characters that each token covers; None if this tokenizer does not report them."""
        return None if self.encoding is None else list(self.encoding.offsets)


# A computation that needs texts tokenized: it yields them and is sent their tokens, so that one call of the tokenizer
# can serve many rows.
Tokenizing: TypeAlias = Generator[Sequence[str], list[TokenizedText], T]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize texts as they are: no BOS, no EOS, no truncation."""
    if tokenizer.is_fast and _calls_backend(type(tokenizer)):
        return _tokenize_directly(tokenizer.backend_tokenizer, texts)
    fast = bool(tokenizer.is_fast)
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, **options)
    encodings = encoded.encodings if fast else [None] * len(texts)
    return [TokenizedText(ids, encoding) for ids, encoding in zip(encoded["input_ids"], encodings, strict=True)]


def _tokenize_directly(backend: Any, texts: Sequence[str]) -> list[TokenizedText]:
    """The same tokens as from transformers, without the 0.1 ms that its wrapper takes for each text."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return [TokenizedText(one.ids, one) for one in backend.encode_batch(list(texts), add_special_tokens=False)]


def _calls_backend(kind: type) -> bool:
    """Whether a class of tokenizers passes texts to its backend unchanged, as transformers' own fast classes do."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    return all(
        getattr(kind, name, None) is getattr(base, name, None)
        for base, name in ((PreTrainedTokenizerBase, "__call__"), (PreTrainedTokenizerFast, "_encode_plus"))
    )


def run_tokenizing(tokenizer: PreTrainedTokenizerBase, work: Tokenizing[T]) -> T:
    """The result of one computation, with its texts tokenized as it asks for them."""
    texts = next_texts(work)
    while not isinstance(texts, Finished):
        texts = next_texts(work, tokenize(tokenizer, texts))
    return texts.result


@dataclass(frozen=True)
class Finished(Generic[T]):
    """The result of a computation that needs no more texts."""

    result: T


def next_texts(work: Tokenizing[T], tokens: list[TokenizedText] | None = None) -> Sequence[str] | Finished[T]:
    """Send the tokens of the texts before, and return the next texts, or the result."""
    try:
        return next(work) if tokens is None else work.send(tokens)
    except StopIteration as end:
        return Finished(end.value)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before any text (BOS, or nothing)."""
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    start = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
    return whole[:start]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens: BOS, EOS, ends of turns, ..."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def splitting_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens at which a fast tokenizer splits any text before it does anything else; {} for a slow one."""
    if not (tokenizer.is_fast and _calls_backend(type(tokenizer))):
        return {}
    added = tokenizer.added_tokens_decoder.items()
    return {
        token.content: number
        for number, token in added
        if token.special and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A 128-bit hash of how the tokenizer encodes text. Padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        facts.pop("padding", None)
        facts.pop("truncation", None)
    else:
        facts = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    class_name = type(tokenizer).__name__ if backend is None else ""
    text = json.dumps([class_name, facts, special, prefix_ids(tokenizer)], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
