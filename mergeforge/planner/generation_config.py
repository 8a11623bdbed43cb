"""generation_config.json of a merge with an adapter that ends its answers with another token than the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.io.aux_files import AuxFile, AuxFiles
from mergeforge.tokenizer import ModelTokenizer
from mergeforge.tokenizer.hf_files import named_tokens, read_object
from mergeforge.tokenizer.hf_vocabulary import MAX_TOKENS, read_vocabulary
from mergeforge.tokenizer.output_files import json_file

GENERATION, EOS = "generation_config.json", "eos_token_id"
_IDS = ("bos_token_id", EOS, "pad_token_id")


def with_eos_of(files: AuxFiles, before: AuxFiles, config: Mapping[str, Any]) -> dict[str, AuxFile]:
    """`files` with the tokenizer's EOS as the first token that ends a generation, if `before` had another one.

    transformers and vLLM stop at the ids in generation_config.json, and not at the tokenizer's EOS.
    """
    token = _eos_token(files)
    if not token or token == _eos_token(before):
        return dict(files)
    number = _token_id(files, token)
    text_config = config.get("text_config")
    ids = {name: value for name, value in {**config, **(text_config or {})}.items() if name in _IDS}
    generation = read_object(files, GENERATION) or ids
    old = generation.get(EOS)
    stops = [number, *(old if isinstance(old, list) else [old])]
    generation = generation | {EOS: list(dict.fromkeys(stop for stop in stops if stop is not None))}
    return {**files, GENERATION: json_file(GENERATION, generation)} if number is not None else dict(files)


def _eos_token(files: AuxFiles) -> str:
    config, special_map = (
        read_object(files, name) or {} for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    return named_tokens(config, special_map).role_texts.get("eos", "")


def _token_id(files: AuxFiles, token: str) -> int | None:
    """None for a tokenizer whose files cannot be read here, such as tokenizer.model alone."""
    try:
        return read_vocabulary(ModelTokenizer("adapter", files, MAX_TOKENS, True)).ids.get(token)
    except SourceError:
        return None
