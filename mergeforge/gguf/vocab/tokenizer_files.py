"""The tokenizer files of one model, each read at most once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.sentencepiece import SentencePieceModel, read_sentencepiece
from mergeforge.gguf.vocab.tokens import check_rows
from mergeforge.io.aux_files import AuxFiles
from mergeforge.tokenizer.hf_files import AddedToken, added_tokens, named_tokens, read_object, read_text

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True)
class TokenizerFiles:
    """A model's tokenizer files, its config.json, and the number of rows of its token embedding.

    `pre`: the pre-tokenizer's name, if the user set one.
    """

    paths: AuxFiles
    config: Mapping[str, Any]
    rows: int
    pre: str | None = None

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return read_object(self.paths, "tokenizer_config.json") or {}

    @cached_property
    def special_map(self) -> dict[str, Any]:
        """special_tokens_map.json."""
        return read_object(self.paths, "special_tokens_map.json") or {}

    @cached_property
    def added_json(self) -> dict[str, Any]:
        """added_tokens.json."""
        return read_object(self.paths, "added_tokens.json") or {}

    @cached_property
    def hparams(self) -> dict[str, Any]:
        """config.json; its text_config, if there is one, wins."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def family(self) -> str:
        """config.json's model_type."""
        return str(self.hparams.get("model_type") or "")

    @property
    def tokenizer_class(self) -> str:
        """tokenizer_config.json's tokenizer_class without `Fast`."""
        return str(self.tokenizer_config.get("tokenizer_class") or "").removesuffix("Fast")

    @cached_property
    def sentencepiece(self) -> SentencePieceModel | None:
        """tokenizer.model, if there is one."""
        return read_sentencepiece(self.paths["tokenizer.model"]) if "tokenizer.model" in self.paths else None

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """tokenizer.json, if there is one."""
        content = read_object(self.paths, "tokenizer.json")
        if content is not None and not (isinstance(content.get("model"), dict) and content["model"].get("vocab")):
            raise SourceError(
                f"{self.paths['tokenizer.json']} has no model.vocab",
                hint="save the tokenizer again with transformers, or copy tokenizer.json from the base model",
            )
        return content

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json, or vocab.json and merges.txt in the same form. Raises SourceError if there is neither."""
        tokenizer = self.tokenizer_json if self.tokenizer_json is not None else self._from_vocab_and_merges()
        if tokenizer is None:
            raise SourceError(
                "the model has no tokenizer: its folder has neither tokenizer.json, nor tokenizer.model, nor "
                f"vocab.json with merges.txt (it has {', '.join(sorted(self.paths)) or 'no such files at all'})",
                hint="copy the base model's tokenizer files into the model's folder",
            )
        if not tokenizer["model"].get("merges") and "merges.txt" in self.paths:
            tokenizer["model"]["merges"] = _parse_merges(read_text(self.paths, "merges.txt") or "")
        return tokenizer

    def _from_vocab_and_merges(self) -> dict[str, Any] | None:
        vocab = read_object(self.paths, "vocab.json")
        if vocab is None or "merges.txt" not in self.paths:
            return None
        decoder_entries = self.tokenizer_config.get("added_tokens_decoder") or {}
        added_ids = {text: int(token_id) for text, token_id in self.added_json.items()}
        added_ids |= {entry["content"]: int(token_id) for token_id, entry in decoder_entries.items()}
        tokenizer_class = self.tokenizer_class or ("GPT2Tokenizer" if self.family == "gpt2" else "")
        return {
            "added_tokens": [{"id": token_id, "content": text} for text, token_id in added_ids.items()],
            "pre_tokenizer": _BYTE_LEVEL if tokenizer_class == "GPT2Tokenizer" else None,
            "decoder": _BYTE_LEVEL,
            "post_processor": _BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        vocab = (self.tokenizer.get("model") or {}).get("vocab") or {}
        ids = vocab if isinstance(vocab, Mapping) else {entry[0]: index for index, entry in enumerate(vocab)}
        stored = self.tokenizer.get("added_tokens") or ()
        tokens = added_tokens(ids, stored, self.tokenizer_config, self.special_map)
        return {token.number: token for token in tokens.values()}

    @cached_property
    def named_texts(self) -> set[str]:
        """The texts of the special tokens that the configuration names."""
        return named_tokens(self.tokenizer_config, self.special_map).texts

    def model_texts(self) -> dict[int, str]:
        """The texts of the tokenizer's model by id, without added tokens.

        Raises SourceError if the token embedding has no row for one of them or for a token in `added_tokens`.
        """
        texts = {token_id: text for text, token_id in self.tokenizer["model"]["vocab"].items()}
        stored = {token_id: token.text for token_id, token in self.added.items() if token.stored}
        check_rows({**texts, **stored}, self.rows, self.tokenizer_name)
        return texts

    @property
    def tokenizer_name(self) -> str:
        """The file to name in an error about `tokenizer`."""
        return str(self.paths.get("tokenizer.json") or self.paths.get("vocab.json") or "tokenizer.json")


def _parse_merges(content: str) -> list[str]:
    """The merges in a merges.txt: one pair per line, after an optional first line that starts with #."""
    lines = content.splitlines()
    pairs = [line.split() for line in (lines[1:] if lines and lines[0].startswith("#") else lines)]
    return [" ".join(pair) for pair in pairs if len(pair) == 2]
