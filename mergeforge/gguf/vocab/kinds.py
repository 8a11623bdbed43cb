"""The kinds of vocabulary: how each becomes `tokenizer.*` keys, in the order of llama.cpp's converter."""

from __future__ import annotations

from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Keys, Value, array, boolean, string, u32
from mergeforge.gguf.vocab.bpe import bpe_tokens, merges_of
from mergeforge.gguf.vocab.chat_templates import template_keys
from mergeforge.gguf.vocab.pre_tokenizer import Wanted, asked_for, pre_tokenizer, unapplied
from mergeforge.gguf.vocab.special_tokens import Special, special_tokens
from mergeforge.gguf.vocab.spm import adds_space, is_rebuildable, phi3_tokens, piece_tokens, rebuilt_tokens
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import Tokens, check_distinct, padded_note
from mergeforge.gguf.vocab.wordpiece import (
    unigram_keys,
    unigram_tokens,
    wordpiece_pre,
    wordpiece_tokens,
    xlm_roberta_tokens,
)
from mergeforge.tokenizer.hf_files import token_text

Made = tuple[dict[str, Value], list[str]]  # keys in order, notes
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"


def gpt2(given: TokenizerFiles, special: Special | None = None) -> Made:
    """Byte-level BPE."""
    tokenizer = given.tokenizer
    if is_rebuildable(tokenizer) and given.pre is None:
        return spm(given)
    if tokenizer["model"].get("type", "BPE") != "BPE":
        raise SourceError(
            f"{given.tokenizer_name()} is a {tokenizer['model']['type']} vocabulary, this family's is not",
            hint="copy the base model's tokenizer files, tokenizer.model too if it has one",
        )
    special = special or special_of(given)
    tokens = bpe_tokens(tokenizer, given.added, given.rows)
    pre, notes = _pre(given, special)
    notes += unapplied(tokenizer)
    keys = {"tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string(pre)}
    keys |= tokens.keys(scores=False)
    keys["tokenizer.ggml.merges"] = array("string", merges_of(tokenizer, given.tokenizer_name()))
    return {**keys, **special_keys(given, special)}, [*notes, *notes_of(tokens, special)]


def _pre(given: TokenizerFiles, special: Special) -> tuple[str, list[str]]:
    """The pre-tokenizer's name; where the engine would add a BOS that the tokenizer does not, a key says so."""
    tokenizer = given.tokenizer
    wanted = Wanted(
        family=given.family,
        adds_bos=special.adds.get("bos", False),
        ignore_merges=bool(tokenizer["model"].get("ignore_merges")),
        clean_spaces=given.tokenizer_config.get("clean_up_tokenization_spaces"),
        roberta=special.adds.get("sep", False) and special.adds.get("bos", False),
    )
    row = asked_for(given.pre) if given.pre else pre_tokenizer(tokenizer, wanted, given.tokenizer_name())
    notes = []
    if row.bos and "bos" not in special.adds:
        special.adds["bos"] = False
        notes.append(f"the tokenizer adds no BOS: add_bos_token is false, against the default of {row.name}")
    if row.ignore_merges and not wanted.ignore_merges:
        notes.append(f"{row.name} takes a word that is a token whole, which tokenizer.json does not say")
    return row.name, notes


def spm(given: TokenizerFiles, *, space: bool | None = None, phi3: bool = False) -> Made:
    """A sentencepiece vocabulary. `space`: whether a space comes before a text, where the family says so."""
    tokens, spaced = _spm_tokens(given, phi3)
    if given.pre is not None and asked_for(given.pre).name != "default":
        tokens.notes.append(f"--pre {given.pre} has no effect: the vocabulary is sentencepiece's")
    special = special_of(given, limit=given.rows)
    keys = {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        **tokens.keys(scores=True),
    }
    keys |= special_keys(given, special)
    if space is not None:
        keys[SPACE_PREFIX] = boolean(space)
    elif not spaced and given.tokenizer_config.get("add_prefix_space") is None:
        keys[SPACE_PREFIX] = boolean(False)
        tokens.notes.append("the tokenizer puts no space before a text: add_space_prefix is false")
    return keys, notes_of(tokens, special)


def _spm_tokens(given: TokenizerFiles, phi3: bool) -> tuple[Tokens, bool]:
    """The tokens, and whether the tokenizer puts a space before a text."""
    if given.pieces is not None:
        tokens = piece_tokens(given.pieces, given.added_json, {} if phi3 else given.tokenizer_config, given.rows)
        if phi3:
            phi3_tokens(tokens, given.tokenizer_config, given.tokenizer_json or {})
        return tokens, given.pieces.add_dummy_prefix
    if not is_rebuildable(given.tokenizer):
        raise SourceError(
            f"this family has a sentencepiece vocabulary, and {given.tokenizer_name()} is not made of one",
            hint="copy tokenizer.model from the base model",
        )
    return rebuilt_tokens(given.tokenizer, given.added, given.rows), adds_space(given.tokenizer)


def spm_or_gpt2(given: TokenizerFiles) -> Made:
    """SPM from tokenizer.model or a tokenizer.json made of one, else BPE."""
    if given.pieces is not None or is_rebuildable(given.tokenizer):
        return spm(given)
    return gpt2(given)


def bert(given: TokenizerFiles) -> Made:
    """WordPiece."""
    tokens = wordpiece_tokens(given.tokenizer, given.added, given.rows)
    special = special_of(given, limit=given.rows)
    keys: dict[str, Value] = {**type_count(given), "tokenizer.ggml.model": string("bert")}
    keys["tokenizer.ggml.pre"] = string(given.pre or wordpiece_pre(given.tokenizer))
    return {**keys, **tokens.keys(scores=False), **special_keys(given, special)}, notes_of(tokens, special)


def unigram(given: TokenizerFiles) -> Made:
    """XLM-RoBERTa's unigram vocabulary."""
    if "sentencepiece.bpe.model" in given.files:
        tokens, normalizing = xlm_roberta_tokens(given.files["sentencepiece.bpe.model"], given.rows)
    else:
        unknown = token_text(given.tokenizer_config.get("unk_token")) or None
        tokens = unigram_tokens(given.tokenizer, given.added, given.named, unknown, given.rows)
        normalizing = unigram_keys(given.tokenizer, given.tokenizer_config)
    special = special_of(given, limit=given.rows)
    keys = {"tokenizer.ggml.model": string("t5"), "tokenizer.ggml.pre": string("default"), **tokens.keys(scores=True)}
    keys |= {SPACE_PREFIX: normalizing[SPACE_PREFIX], **type_count(given), **without(normalizing, SPACE_PREFIX)}
    return {**keys, **special_keys(given, special)}, notes_of(tokens, special)


def none(given: TokenizerFiles) -> Made:
    """No vocabulary."""
    return {"tokenizer.ggml.model": string("none")}, []


def special_of(given: TokenizerFiles, limit: int | None = None) -> Special:
    tokenizer = given.tokenizer_json if given.pieces is not None else given.tokenizer
    return special_tokens(tokenizer, given.tokenizer_config, given.config, limit=limit)


def special_keys(given: TokenizerFiles, special: Special) -> Keys:
    return {**special.id_keys(), **template_keys(given.files, given.tokenizer_config), **special.normalizer}


def notes_of(tokens: Tokens, special: Special) -> list[str]:
    check_distinct(tokens)
    return [*tokens.notes, *special.notes, padded_note(tokens)]


def type_count(given: TokenizerFiles) -> dict[str, Value]:
    return {"tokenizer.ggml.token_type_count": u32(given.hparams.get("type_vocab_size", 1))}


def without(keys: Any, name: str) -> dict[str, Value]:
    return {key: value for key, value in keys.items() if key != name}
