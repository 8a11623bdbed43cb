"""The tokenizer files of one model, read and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.bpe import merges_of_text
from mergeforge.gguf.vocab.sentencepiece import PieceModel, piece_model
from mergeforge.io.aux_files import AuxFiles
from mergeforge.tokenizer.hf_files import AddedToken, added_tokens, named_tokens, read_object, read_text

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model's tokenizer files say, its config.json, and the rows of its token embedding."""

    files: AuxFiles
    config: Mapping[str, Any]
    rows: int
    pre: str | None = None

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return read_object(self.files, "tokenizer_config.json") or {}

    @cached_property
    def special_map(self) -> dict[str, Any]:
        return read_object(self.files, "special_tokens_map.json") or {}

    @cached_property
    def added_json(self) -> dict[str, Any]:
        return read_object(self.files, "added_tokens.json") or {}

    @cached_property
    def hparams(self) -> dict[str, Any]:
        """config.json with its text_config, if any, on top."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def family(self) -> str:
        return str(self.hparams.get("model_type") or "")

    @cached_property
    def pieces(self) -> PieceModel | None:
        return piece_model(self.files["tokenizer.model"]) if "tokenizer.model" in self.files else None

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """tokenizer.json, when there is one."""
        found = read_object(self.files, "tokenizer.json")
        if found is not None and not (isinstance(found.get("model"), dict) and found["model"].get("vocab")):
            raise SourceError(f"{self.files['tokenizer.json']} has no model.vocab", hint="save the tokenizer again")
        return found

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json, or what vocab.json and merges.txt say in its form. Raises SourceError without either."""
        found = self.tokenizer_json if self.tokenizer_json is not None else self._of_vocab_and_merges()
        if found is None:
            raise SourceError(
                f"the model has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json with merges.txt "
                f"is among its files ({', '.join(sorted(self.files)) or 'there are none'})",
                hint="copy the base model's tokenizer files beside config.json",
            )
        if not found["model"].get("merges") and "merges.txt" in self.files:
            found["model"]["merges"] = merges_of_text(read_text(self.files, "merges.txt") or "")
        return found

    def _of_vocab_and_merges(self) -> dict[str, Any] | None:
        vocab = read_object(self.files, "vocab.json")
        if vocab is None or "merges.txt" not in self.files:
            return None
        listed = self.tokenizer_config.get("added_tokens_decoder") or {}
        texts = {**{text: int(number) for text, number in self.added_json.items()}}
        texts |= {entry["content"]: int(number) for number, entry in listed.items()}
        return {
            "added_tokens": [{"id": number, "content": text} for text, number in texts.items()],
            "pre_tokenizer": _BYTE_LEVEL if self._says_gpt2() else None,
            "decoder": _BYTE_LEVEL,
            "post_processor": _BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }

    def _says_gpt2(self) -> bool:
        name = self.tokenizer_config.get("tokenizer_class") or ("GPT2Tokenizer" if self.family == "gpt2" else "")
        return str(name).removesuffix("Fast") == "GPT2Tokenizer"

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        vocab = (self.tokenizer.get("model") or {}).get("vocab") or {}
        ids = vocab if isinstance(vocab, Mapping) else {entry[0]: index for index, entry in enumerate(vocab)}
        stored = self.tokenizer.get("added_tokens") or ()
        tokens = added_tokens(ids, stored, self.tokenizer_config, self.special_map)
        return {token.number: token for token in tokens.values()}

    @cached_property
    def named(self) -> set[str]:
        """The texts of the tokens that the configuration names."""
        return named_tokens(self.tokenizer_config, self.special_map).texts

    def tokenizer_name(self) -> str:
        """Which file an error should name."""
        return str(self.files.get("tokenizer.json") or self.files.get("vocab.json") or "tokenizer.json")
