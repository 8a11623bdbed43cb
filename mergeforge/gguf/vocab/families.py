"""The vocabularies of families that need more than their kind, and all kinds by name."""

from __future__ import annotations

from collections.abc import Callable

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Value, array, boolean, string, u32
from mergeforge.gguf.vocab.bpe import merges_of
from mergeforge.gguf.vocab.kinds import (
    SPACE_PREFIX,
    Made,
    bert,
    gpt2,
    none,
    notes_of,
    special_keys,
    special_of,
    spm,
    spm_or_gpt2,
    type_count,
    unigram,
    without,
)
from mergeforge.gguf.vocab.spm import adds_space, gemma4_tokens, is_rebuildable
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles


def llama(given: TokenizerFiles) -> Made:
    """As spm_or_gpt2, with what llama.cpp knows of CodeLlama's and Granite's vocabularies by their size."""
    found: dict[str, Value] = {}
    prefix = given.tokenizer_config.get("add_prefix_space")
    if prefix is not None:
        found[SPACE_PREFIX] = boolean(prefix)
    keys, notes = spm_or_gpt2(given)
    found |= keys
    size = given.hparams.get("vocab_size", 32000)
    if size == 32016:
        found.setdefault("tokenizer.ggml.eot_token_id", u32(32010))
    if size == 49152:
        found["tokenizer.ggml.add_bos_token"] = boolean(False)
    return found, notes


def gemma(given: TokenizerFiles) -> Made:
    """Gemma's first two: SPM without a space before a text; in the first 107 ends a turn."""
    keys, notes = spm(given, space=False)
    eot = {"tokenizer.ggml.eot_token_id": u32(107)} if given.family == "gemma" and given.rows > 107 else {}
    return {**without(keys, SPACE_PREFIX), **eot, SPACE_PREFIX: boolean(False)}, notes


def internlm2(given: TokenizerFiles) -> Made:
    """SPM, whose added tokens are as Phi-3's; <|im_end|> is the EOS of a chat model."""
    keys, notes = _internlm(given, phi3=True)
    space = boolean(given.pieces.add_dummy_prefix if given.pieces else adds_space(given.tokenizer))
    return _after(keys, "tokenizer.ggml.token_type", {SPACE_PREFIX: space}), notes


def internlm3(given: TokenizerFiles) -> Made:
    """SPM; <|im_end|> is the EOS of a chat model."""
    keys, notes = _internlm(given, phi3=False)
    space = given.tokenizer_config.get("add_prefix_space")
    return (keys if space is None else _after(keys, "tokenizer.ggml.token_type", {SPACE_PREFIX: boolean(space)})), notes


def _internlm(given: TokenizerFiles, phi3: bool) -> Made:
    keys, notes = spm(given, phi3=phi3)
    eos = next((number for number, text in enumerate(keys["tokenizer.ggml.tokens"].value) if text == "<|im_end|>"), -1)
    if eos >= 0:
        keys["tokenizer.ggml.eos_token_id"] = u32(eos)
    return keys, notes


def gemma3(given: TokenizerFiles) -> Made:
    """SPM without a space before a text, else BPE."""
    rebuilt = given.pieces is None and not is_rebuildable(given.tokenizer)
    return gpt2(given) if rebuilt else spm(given, space=False)


def gemma4(given: TokenizerFiles) -> Made:
    """BPE over raw UTF-8, spaces spelled U+2581."""
    special = special_of(given)
    tokens = gemma4_tokens(given.tokenizer, given.added, given.named, given.rows)
    keys = {"tokenizer.ggml.model": string("gemma4"), **tokens.keys(scores=True)}
    keys["tokenizer.ggml.merges"] = array("string", merges_of(given.tokenizer, given.tokenizer_name()))
    keys |= special_keys(given, special)
    return {**keys, SPACE_PREFIX: boolean(False), "tokenizer.ggml.add_bos_token": boolean(True)}, notes_of(
        tokens, special
    )


def phi3(given: TokenizerFiles) -> Made:
    """SPM, where tokenizer.json's added tokens win; Phi-4's is BPE."""
    named = str(given.tokenizer_config.get("tokenizer_class", "")).removesuffix("Fast") == "GPT2Tokenizer"
    if named or (given.pieces is None and not is_rebuildable(given.tokenizer)):
        return gpt2(given)
    return spm(given, phi3=True)


def glm4(given: TokenizerFiles) -> Made:
    """GLM-4's and GLM-Edge's BPE; the special tokens have fixed names."""
    return _glm(given, eos="<|endoftext|>", eot="<|user|>", unk="<|endoftext|>", bos="<|endoftext|>")


def glm4_moe(given: TokenizerFiles) -> Made:
    """GLM-4.5's and later ones' BPE; the special tokens have fixed names."""
    return _glm(given, bos="[gMASK]", eot="<|user|>", unk="<|endoftext|>", eom="<|observation|>")


def chatglm(given: TokenizerFiles) -> Made:
    """BPE; the special tokens have fixed names."""
    return _glm(given, eos="<|endoftext|>", eot="<|user|>", unk="<|endoftext|>")


def _glm(given: TokenizerFiles, **texts: str) -> Made:
    special = special_of(given)
    numbers = {one.text: number for number, one in given.added.items()}
    for kind, token in texts.items():
        if token not in numbers:
            raise SourceError(f"the tokenizer has no added token {token!r}, which this family needs as {kind}")
        special.take(kind, numbers[token], None, given.tokenizer_name())
    return gpt2(given, special)


def stablelm(given: TokenizerFiles) -> Made:
    """BPE."""
    return gpt2(given)


def roberta(given: TokenizerFiles) -> Made:
    """BPE with a number of token types; without tokenizer.json or its like WordPiece."""
    if given.tokenizer["model"].get("type") == "WordPiece":
        return bert(given)
    keys, notes = gpt2(given)
    return {**keys, **type_count(given)}, notes


_BPE = (gpt2, stablelm, glm4, glm4_moe, chatglm, roberta)
_SPM = (llama, spm_or_gpt2, spm, gemma, gemma3, phi3, internlm2, internlm3)
KINDS: dict[str, Callable[[TokenizerFiles], Made]] = {
    one.__name__: one for one in (*_BPE, *_SPM, gemma4, bert, unigram, none)
}


def _after(keys: dict[str, Value], name: str, more: dict[str, Value]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in keys.items():
        if key not in more:
            found[key] = value
        if key == name:
            found |= more
    return found
