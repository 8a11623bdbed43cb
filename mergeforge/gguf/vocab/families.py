"""The vocabularies of model families that need more than a plain kind, and all kinds by name."""

from __future__ import annotations

from collections.abc import Callable

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Value, array, boolean, string, u32
from mergeforge.gguf.vocab.bpe import bpe_merges
from mergeforge.gguf.vocab.kinds import (
    SPACE_PREFIX,
    KeysAndNotes,
    bert,
    gpt2,
    none,
    special_keys,
    special_tokens,
    spm,
    spm_or_gpt2,
    type_count,
    unigram,
    vocab_notes,
    without,
)
from mergeforge.gguf.vocab.spm import adds_space, gemma4_tokens, is_rebuildable
from mergeforge.gguf.vocab.spm_variants import arctic, t5
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles


def llama(files: TokenizerFiles) -> KeysAndNotes:
    """Like spm_or_gpt2, plus what llama.cpp knows about CodeLlama's and Granite's vocabularies from their size."""
    keys: dict[str, Value] = {}
    space_prefix = files.tokenizer_config.get("add_prefix_space")
    if space_prefix is not None:
        keys[SPACE_PREFIX] = boolean(space_prefix)
    vocab_keys, notes = spm_or_gpt2(files)
    keys |= vocab_keys
    size = files.hparams.get("vocab_size", 32000)
    if size == 32016:  # CodeLlama
        keys.setdefault("tokenizer.ggml.eot_token_id", u32(32010))
    if size == 49152:  # Granite
        keys["tokenizer.ggml.add_bos_token"] = boolean(False)
    return keys, notes


def gemma(files: TokenizerFiles) -> KeysAndNotes:
    """Gemma and Gemma 2: sentencepiece without a space before a text. In Gemma, token 107 ends a turn."""
    keys, notes = spm(files, space_prefix=False)
    eot = {"tokenizer.ggml.eot_token_id": u32(107)} if files.family == "gemma" and files.rows > 107 else {}
    return {**without(keys, SPACE_PREFIX), **eot, SPACE_PREFIX: boolean(False)}, notes


def internlm2(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece with added tokens like Phi-3's; <|im_end|> is the EOS of a chat model."""
    keys, notes = _internlm(files, phi3=True)
    model = files.sentencepiece
    space_prefix = boolean(model.add_dummy_prefix if model else adds_space(files.tokenizer))
    return _insert_after(keys, "tokenizer.ggml.token_type", {SPACE_PREFIX: space_prefix}), notes


def internlm3(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece; <|im_end|> is the EOS of a chat model."""
    keys, notes = _internlm(files, phi3=False)
    space_prefix = files.tokenizer_config.get("add_prefix_space")
    if space_prefix is None:
        return keys, notes
    return _insert_after(keys, "tokenizer.ggml.token_type", {SPACE_PREFIX: boolean(space_prefix)}), notes


def _internlm(files: TokenizerFiles, phi3: bool) -> KeysAndNotes:
    keys, notes = spm(files, phi3=phi3)
    texts = keys["tokenizer.ggml.tokens"].value
    if "<|im_end|>" in texts:
        keys["tokenizer.ggml.eos_token_id"] = u32(texts.index("<|im_end|>"))
    return keys, notes


def gemma3(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece without a space before a text, else BPE."""
    is_bpe = files.sentencepiece is None and not is_rebuildable(files.tokenizer)
    return gpt2(files) if is_bpe else spm(files, space_prefix=False)


def gemma4(files: TokenizerFiles) -> KeysAndNotes:
    """BPE over raw UTF-8, with U+2581 for a space."""
    special = special_tokens(files)
    tokens = gemma4_tokens(files)
    keys = {"tokenizer.ggml.model": string("gemma4"), **tokens.keys(scores=True)}
    keys["tokenizer.ggml.merges"] = array("string", bpe_merges(files.tokenizer, files.tokenizer_name))
    keys |= special_keys(files, special)
    keys |= {SPACE_PREFIX: boolean(False), "tokenizer.ggml.add_bos_token": boolean(True)}
    return keys, vocab_notes(tokens, special)


def phi3(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece, where tokenizer.json's added tokens win; Phi-4's vocabulary is BPE."""
    is_bpe = files.sentencepiece is None and not is_rebuildable(files.tokenizer)
    if files.tokenizer_class == "GPT2Tokenizer" or is_bpe:
        return gpt2(files)
    return spm(files, phi3=True)


def glm4(files: TokenizerFiles) -> KeysAndNotes:
    """GLM-4's and GLM-Edge's BPE, with special tokens of fixed names."""
    return _glm(files, eos="<|endoftext|>", eot="<|user|>", unk="<|endoftext|>", bos="<|endoftext|>")


def glm4_moe(files: TokenizerFiles) -> KeysAndNotes:
    """The BPE of GLM-4.5 and later, with special tokens of fixed names."""
    return _glm(files, bos="[gMASK]", eot="<|user|>", unk="<|endoftext|>", eom="<|observation|>")


def chatglm(files: TokenizerFiles) -> KeysAndNotes:
    """BPE with special tokens of fixed names."""
    return _glm(files, eos="<|endoftext|>", eot="<|user|>", unk="<|endoftext|>")


def _glm(files: TokenizerFiles, **role_texts: str) -> KeysAndNotes:
    special = special_tokens(files)
    ids = {token.text: token_id for token_id, token in files.added.items()}
    for role, text in role_texts.items():
        if text not in ids:
            raise SourceError(
                f"{files.tokenizer_name} has no added token {text!r}, which this model family needs as {role}",
                hint="copy the base model's tokenizer files into the model's folder",
            )
        special.set_id(role, ids[text], None, files.tokenizer_name)
    return gpt2(files, special)


def spm_with_prefix(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece; tokenizer_config.json says whether a space is put before a text."""
    keys, notes = spm(files)
    space_prefix = files.tokenizer_config.get("add_prefix_space")
    return keys if space_prefix is None else {**keys, SPACE_PREFIX: boolean(space_prefix)}, notes


def gpt2_or_spm(files: TokenizerFiles) -> KeysAndNotes:
    """BPE from tokenizer.json, else sentencepiece."""
    return gpt2(files) if files.tokenizer_json is not None else spm(files)


def jamba(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece; without tokenizer.model no space is put before a text."""
    if files.sentencepiece is not None:
        return spm(files)
    keys, notes = spm(files, space_prefix=False)
    return {**without(keys, SPACE_PREFIX), SPACE_PREFIX: boolean(False)}, notes


def nemotron(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece; the converter states the ids of padding and unknown tokens."""
    keys, notes = spm(files)
    return keys | {"tokenizer.ggml.padding_token_id": u32(0), "tokenizer.ggml.unknown_token_id": u32(1)}, notes


def llada(files: TokenizerFiles) -> KeysAndNotes:
    """BPE, always with a BOS."""
    keys, notes = gpt2(files)
    return keys | {"tokenizer.ggml.add_bos_token": boolean(True)}, notes


def hunyuan(files: TokenizerFiles) -> KeysAndNotes:
    """BPE; a text ends with the token eod_token_id of config.json."""
    keys, notes = gpt2(files)
    return keys | _end_of_document(files), notes


def hunyuan_moe(files: TokenizerFiles) -> KeysAndNotes:
    """BPE; <|startoftext|> has a fixed id."""
    keys, notes = gpt2(files)
    start = {"tokenizer.ggml.bos_token_id": u32(127959)} if files.rows > 127959 else {}
    return keys | start, notes


def _end_of_document(files: TokenizerFiles) -> dict[str, Value]:
    token_id = files.hparams.get("eod_token_id")
    return {} if token_id is None else {"tokenizer.ggml.eos_token_id": u32(token_id)}


def solar_open(files: TokenizerFiles) -> KeysAndNotes:
    """BPE with special tokens of fixed names."""
    return _glm(files, eos="<|endoftext|>", eot="<|endoftext|>", unk="<unk>", bos="<|startoftext|>")


def qwen3_omni(files: TokenizerFiles) -> KeysAndNotes:
    """BPE; a turn begins and ends with <|im_end|>."""
    keys, notes = gpt2(files)
    return keys | _turn_end(files), notes


def qwen3_asr(files: TokenizerFiles) -> KeysAndNotes:
    """As qwen3_omni, with a plain ChatML template."""
    keys, notes = spm_or_gpt2(files)
    return keys | {"tokenizer.chat_template": string(_CHATML)} | _turn_end(files), notes


def _turn_end(files: TokenizerFiles) -> dict[str, Value]:
    added = files.tokenizer_config.get("added_tokens_decoder") or {}
    ids = [int(token_id) for token_id, token in added.items() if token.get("content") == "<|im_end|>"]
    return {f"tokenizer.ggml.{role}_token_id": u32(ids[0]) for role in ("bos", "eos")} if ids else {}


def stablelm(files: TokenizerFiles) -> KeysAndNotes:
    """BPE."""
    return gpt2(files)


def roberta(files: TokenizerFiles) -> KeysAndNotes:
    """BPE with a number of token types, or WordPiece, depending on tokenizer.json."""
    if files.tokenizer["model"].get("type") == "WordPiece":
        return bert(files)
    keys, notes = gpt2(files)
    return {**keys, **type_count(files)}, notes


def modern_bert(files: TokenizerFiles) -> KeysAndNotes:
    """BPE between <cls> and <sep>."""
    keys, notes = gpt2(files)
    added = {f"tokenizer.ggml.add_{role}_token": boolean(True) for role in ("bos", "eos", "sep")}
    return added | keys, notes


def eurobert(files: TokenizerFiles) -> KeysAndNotes:
    """BPE without a BOS."""
    keys, notes = gpt2(files)
    return {"tokenizer.ggml.add_bos_token": boolean(False)} | keys, notes


def jina_bert(files: TokenizerFiles) -> KeysAndNotes:
    """WordPiece, or BPE with two token types."""
    if files.tokenizer_class != "RobertaTokenizer":
        return bert(files)
    keys, notes = gpt2(files)
    return {**keys, "tokenizer.ggml.token_type_count": u32(2)}, notes


_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BPE = (
    gpt2,
    qwen3_omni,
    qwen3_asr,
    eurobert,
    hunyuan,
    jina_bert,
    modern_bert,
    hunyuan_moe,
    llada,
    solar_open,
    stablelm,
    glm4,
    glm4_moe,
    chatglm,
    roberta,
)
_SPM = (
    gpt2_or_spm,
    jamba,
    spm_with_prefix,
    nemotron,
    llama,
    spm_or_gpt2,
    spm,
    gemma,
    gemma3,
    phi3,
    internlm2,
    internlm3,
)
KINDS: dict[str, Callable[[TokenizerFiles], KeysAndNotes]] = {
    function.__name__: function for function in (*_BPE, *_SPM, arctic, gemma4, bert, unigram, t5, none)
}


def _insert_after(keys: dict[str, Value], name: str, inserted: dict[str, Value]) -> dict[str, Value]:
    """`keys` with `inserted` after the key `name`; keys of the same names elsewhere are dropped."""
    ordered: dict[str, Value] = {}
    for key, value in keys.items():
        if key not in inserted:
            ordered[key] = value
        if key == name:
            ordered |= inserted
    return ordered
