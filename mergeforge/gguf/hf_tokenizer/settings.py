"""tokenizer_config.json, and which tokens stand around a text."""

from __future__ import annotations

from typing import Any

from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary

_TEMPLATE = "tokenizer.chat_template"


def tokenizer_config(vocabulary: StoredVocabulary) -> dict[str, Any]:
    """tokenizer_config.json, with special tokens, added tokens and chat templates."""
    header = vocabulary.header
    names = {f"{role}_token": vocabulary.tokens[token] for role, token in vocabulary.roles.items()}
    added = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in vocabulary.added_tokens}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    config |= {"added_tokens_decoder": added}
    if isinstance(context := header.get(f"{header.get('general.architecture')}.context_length"), int):
        config["model_max_length"] = context
    if (space := vocabulary.get("add_space_prefix")) is not None:
        config["add_prefix_space"] = space
    template = _templates(vocabulary)
    return config | ({"chat_template": template} if template else {})


def _templates(vocabulary: StoredVocabulary) -> Any:
    """The chat template; a list with names if there are several."""
    default = vocabulary.header.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value.value
        for key, value in vocabulary.header.keys.items()
        if key.startswith(f"{_TEMPLATE}.")
    }
    if not named:
        return default
    listed = {**({"default": default} if default else {}), **named}
    return [{"name": name, "template": template} for name, template in listed.items()]


def template_processing(vocabulary: StoredVocabulary, before: list[int], after: list[int]) -> dict[str, Any]:
    """A post-processor that puts tokens before and after a text, and after the second text of a pair."""
    tokens = vocabulary.tokens
    start, end = ([_part("SpecialToken", tokens[token], 0) for token in ids] for ids in (before, after))
    second = [_part("SpecialToken", tokens[token], 1) for token in after]
    single = [*start, _part("Sequence", "A", 0), *end]
    used = dict.fromkeys([*before, *after])
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, _part("Sequence", "B", 1), *second],
        "special_tokens": {
            tokens[token]: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]} for token in used
        },
    }


def _part(kind: str, name: str, type_id: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": type_id}}


def surrounding_tokens(vocabulary: StoredVocabulary, bos: bool, eos: bool) -> tuple[list[int], list[int]]:
    """The ids that are put before and after a text; bos and eos: what the engine does if the file does not say."""
    adds = {"bos": bos, "eos": eos}
    for role in adds:
        stored = vocabulary.get(f"add_{role}_token")
        adds[role] = adds[role] if stored is None else bool(stored)
    roles = vocabulary.roles
    before = [roles["bos"]] if adds["bos"] and "bos" in roles else []
    return before, [roles["eos"]] if adds["eos"] and "eos" in roles else []


def tokenizer_json(vocabulary: StoredVocabulary, **parts: Any) -> dict[str, Any]:
    """tokenizer.json with its parts: normalizer, pre_tokenizer, post_processor, decoder, model."""
    order = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added_tokens}
    return head | {name: parts.get(name) for name in order}


def bpe_model(vocabulary: StoredVocabulary, merges: list[list[str]], **options: Any) -> dict[str, Any]:
    """The model of a BPE tokenizer."""
    usual = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **usual, **options, "vocab": vocabulary.ids, "merges": merges}
