"""The kinds of vocabulary: each function makes one kind's `tokenizer.*` keys, in the order of llama.cpp's converter."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Keys, Value, array, boolean, string, u32
from mergeforge.gguf.vocab.bpe import bpe_merges, bpe_tokens
from mergeforge.gguf.vocab.chat_templates import chat_template_keys
from mergeforge.gguf.vocab.pre_tokenizer import (
    TokenizerTraits,
    match_pre_tokenizer,
    pre_tokenizer_named,
    unsupported_step_notes,
)
from mergeforge.gguf.vocab.special_tokens import SpecialTokens, find_special_tokens
from mergeforge.gguf.vocab.spm import adds_space, is_rebuildable, rebuilt_tokens, sentencepiece_tokens
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import GGUFTokens, check_distinct, padding_note
from mergeforge.gguf.vocab.wordpiece import (
    unigram_keys,
    unigram_tokens,
    wordpiece_pre_tokenizer,
    wordpiece_tokens,
    xlm_roberta_tokens,
)

KeysAndNotes = tuple[dict[str, Value], list[str]]
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"


def gpt2(files: TokenizerFiles, special: SpecialTokens | None = None) -> KeysAndNotes:
    """Byte-level BPE."""
    tokenizer = files.tokenizer
    if is_rebuildable(tokenizer) and files.pre is None:
        return spm(files)
    if tokenizer["model"].get("type", "BPE") != "BPE":
        raise SourceError(
            f"{files.tokenizer_name} holds a {tokenizer['model']['type']} vocabulary, but this model family needs BPE",
            hint="copy the base model's tokenizer files into the model's folder, including tokenizer.model if there is "
            "one",
        )
    special = special or special_tokens(files)
    tokens = bpe_tokens(files)
    pre, notes = _pre_tokenizer(files, special)
    notes += unsupported_step_notes(tokenizer)
    keys = {"tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string(pre)}
    keys |= tokens.keys(scores=False)
    keys["tokenizer.ggml.merges"] = array("string", bpe_merges(tokenizer, files.tokenizer_name))
    return {**keys, **special_keys(files, special)}, [*notes, *vocab_notes(tokens, special)]


def _pre_tokenizer(files: TokenizerFiles, special: SpecialTokens) -> tuple[str, list[str]]:
    """The pre-tokenizer's name, and notes.

    If the engine would add a BOS that the tokenizer does not add, `special` is changed so that a key says so.
    """
    tokenizer = files.tokenizer
    traits = TokenizerTraits(
        family=files.family,
        adds_bos=special.adds.get("bos", False),
        ignore_merges=bool(tokenizer["model"].get("ignore_merges")),
        clean_spaces=files.tokenizer_config.get("clean_up_tokenization_spaces"),
        roberta=special.adds.get("sep", False) and special.adds.get("bos", False),
    )
    row = pre_tokenizer_named(files.pre) if files.pre else match_pre_tokenizer(tokenizer, traits, files.tokenizer_name)
    notes = []
    if row.bos and "bos" not in special.adds:
        special.adds["bos"] = False
        notes.append(f"the tokenizer adds no BOS: add_bos_token is set to false, against the default of {row.name}")
    if row.ignore_merges and not traits.ignore_merges:
        notes.append(
            f"with {row.name}, llama.cpp takes a word that is a token as one token; tokenizer.json does not set "
            "ignore_merges"
        )
    return row.name, notes


def spm(files: TokenizerFiles, *, space_prefix: bool | None = None, phi3: bool = False) -> KeysAndNotes:
    """A sentencepiece vocabulary.

    space_prefix: whether a space is put before a text; None if the tokenizer files decide. phi3: Phi-3's added tokens.
    """
    tokens, tokenizer_adds_space = _spm_tokens(files, phi3)
    if files.pre is not None and pre_tokenizer_named(files.pre).name != "default":
        tokens.notes.append(f"--pre {files.pre} has no effect: a sentencepiece vocabulary has no pre-tokenizer")
    special = special_tokens(files, limit=files.rows)
    keys = {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        **tokens.keys(scores=True),
    }
    keys |= special_keys(files, special)
    if space_prefix is not None:
        keys[SPACE_PREFIX] = boolean(space_prefix)
    elif not tokenizer_adds_space and files.tokenizer_config.get("add_prefix_space") is None:
        keys[SPACE_PREFIX] = boolean(False)
        tokens.notes.append("the tokenizer puts no space before a text: add_space_prefix is set to false")
    return keys, vocab_notes(tokens, special)


def _spm_tokens(files: TokenizerFiles, phi3: bool) -> tuple[GGUFTokens, bool]:
    """The tokens, and whether the tokenizer puts a space before a text."""
    model = files.sentencepiece
    if model is not None:
        return sentencepiece_tokens(model, files, phi3=phi3), model.add_dummy_prefix
    if not is_rebuildable(files.tokenizer):
        raise SourceError(
            f"this model family needs a sentencepiece vocabulary, but {files.tokenizer_name} was not made from one and "
            "there is no tokenizer.model",
            hint="copy tokenizer.model from the base model",
        )
    return rebuilt_tokens(files), adds_space(files.tokenizer)


def spm_or_gpt2(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece from tokenizer.model or from a tokenizer.json that was made from one, else BPE."""
    if files.sentencepiece is not None or is_rebuildable(files.tokenizer):
        return spm(files)
    return gpt2(files)


def bert(files: TokenizerFiles) -> KeysAndNotes:
    """WordPiece."""
    tokens = wordpiece_tokens(files)
    special = special_tokens(files, limit=files.rows)
    keys: dict[str, Value] = {**type_count(files), "tokenizer.ggml.model": string("bert")}
    keys["tokenizer.ggml.pre"] = string(files.pre or wordpiece_pre_tokenizer(files.tokenizer))
    return {**keys, **tokens.keys(scores=False), **special_keys(files, special)}, vocab_notes(tokens, special)


def unigram(files: TokenizerFiles) -> KeysAndNotes:
    """XLM-RoBERTa's unigram vocabulary."""
    if "sentencepiece.bpe.model" in files.paths:
        tokens, normalization = xlm_roberta_tokens(files.paths["sentencepiece.bpe.model"], files.rows)
    else:
        tokens, normalization = unigram_tokens(files), unigram_keys(files.tokenizer, files.tokenizer_config)
    special = special_tokens(files, limit=files.rows)
    keys = {"tokenizer.ggml.model": string("t5"), "tokenizer.ggml.pre": string("default"), **tokens.keys(scores=True)}
    keys |= {SPACE_PREFIX: normalization[SPACE_PREFIX], **type_count(files), **without(normalization, SPACE_PREFIX)}
    return {**keys, **special_keys(files, special)}, vocab_notes(tokens, special)


def none(files: TokenizerFiles) -> KeysAndNotes:
    """No vocabulary."""
    return {"tokenizer.ggml.model": string("none")}, []


def special_tokens(files: TokenizerFiles, limit: int | None = None) -> SpecialTokens:
    # With tokenizer.model, tokenizer.json is optional, and its absence is no error.
    tokenizer = files.tokenizer_json if files.sentencepiece is not None else files.tokenizer
    return find_special_tokens(tokenizer, files.tokenizer_config, files.config, limit=limit)


def special_keys(files: TokenizerFiles, special: SpecialTokens) -> Keys:
    return {**special.keys(), **chat_template_keys(files.paths, files.tokenizer_config), **special.normalizer}


def vocab_notes(tokens: GGUFTokens, special: SpecialTokens) -> list[str]:
    """The notes of a finished vocabulary. Raises SourceError if two ids share a text."""
    check_distinct(tokens)
    return [*tokens.notes, *special.notes, padding_note(tokens)]


def type_count(files: TokenizerFiles) -> dict[str, Value]:
    """The number of token types (BERT's segments)."""
    return {"tokenizer.ggml.token_type_count": u32(files.hparams.get("type_vocab_size", 1))}


def without(keys: Keys, name: str) -> dict[str, Value]:
    return {key: value for key, value in keys.items() if key != name}
