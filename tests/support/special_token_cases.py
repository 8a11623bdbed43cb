"""Models with special tokens and chat templates set in many random places at once, by seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.tokenizer_folders import (
    BYTE_LEVEL,
    GPT2_BYTE_LEVEL,
    added_token,
    byte_level_tokenizer,
    config,
    template_processor,
)

BASE = 480  # tokens of the byte-level model


@dataclass(frozen=True)
class Case:
    """A model to convert: config.json, other files, its kind of vocabulary, and the keys that differ on purpose.

    `pre` is passed to both converters; `family` replaces config.json's model_type for mergeforge.
    """

    settings: Mapping[str, Any]
    files: Mapping[str, Any]
    kind: str
    pre: str | None = None
    family: str = ""
    improved_keys: tuple[str, ...] = ()


def decoder_entries(*tokens: Mapping[str, Any]) -> dict[str, Any]:
    """tokens in the form of tokenizer_config.json's added_tokens_decoder."""
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}


TOKENS = ("<s>", "</s>", "<|eot|>", "<pad>", "[SEP]", "[CLS]")
IDS = {text: BASE + i for i, text in enumerate(TOKENS)}
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot")


def random_template_processor(rng: random.Random) -> dict[str, Any]:
    """A TemplateProcessing, with or without tokens around and between the texts."""

    def part(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    first, last = rng.choice([None, *TOKENS[:3]]), rng.choice([None, *TOKENS[1:5]])
    processor = template_processor(first, last, IDS)
    if rng.random() < 0.5:
        between = [part(rng.choice(TOKENS)) for _ in range(rng.choice([0, 1, 2, 3]))]
        before = [part(first)] if first and rng.random() < 0.8 else []
        after = [part(last)] if last and rng.random() < 0.8 else []
        text_a, text_b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        processor["pair"] = [*before, text_a, *between, text_b, *after]
    used = {part["SpecialToken"]["id"] for part in processor["single"] + processor["pair"] if "SpecialToken" in part}
    processor["special_tokens"] = {text: {"id": text, "ids": [IDS[text]], "tokens": [text]} for text in used}
    return processor


def random_post_processor(rng: random.Random) -> dict[str, Any] | None:
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", IDS["</s>"]], "cls": ["<s>", IDS["<s>"]]}
    return rng.choice(
        [
            None,
            GPT2_BYTE_LEVEL,
            {**roberta, "trim_offsets": True, "add_prefix_space": False},
            random_template_processor(rng),
            {"type": "Sequence", "processors": [GPT2_BYTE_LEVEL, random_template_processor(rng)]},
            {"type": "Sequence", "processors": [BYTE_LEVEL, random_template_processor(rng)]},
        ]
    )


def random_tokenizer_config(rng: random.Random, added: list[dict[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in ROLES:
        if rng.random() < 0.45:
            text = rng.choice(TOKENS)
            entry = {"__type": "AddedToken", **{k: v for k, v in added_token(0, text).items() if k != "id"}}
            names[f"{role}_token"] = rng.choice([text, text, text, entry, None])
        if rng.random() < 0.2:
            names[f"add_{role}_token"] = rng.random() < 0.5
    if rng.random() < 0.3:
        names["additional_special_tokens"] = rng.sample(TOKENS, 2)
    if rng.random() < 0.2:
        names["added_tokens_decoder"] = decoder_entries(*({**token, "special": rng.random() < 0.5} for token in added))
    return names


def random_chat_templates(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chat templates: the entry in tokenizer_config.json, and files."""
    named = [{"name": name, "template": name.upper()} for name in ("default", "tool use", "rag")]
    entry = rng.choice(
        [{}, {}, {}, {"chat_template": "{{ a }}"}, {"chat_template": named}, {"chat_template": named[1:]}]
    )
    files: dict[str, Any] = {}
    if rng.random() < 0.3:
        files["chat_template.jinja"] = "of a jinja file"
        if rng.random() < 0.5:
            files["additional_chat_templates/a-b.jinja"] = (
                "AB"  # with two, the converter's order would depend on the folder
            )
    if rng.random() < 0.3:
        files["chat_template.json"] = {"chat_template": "of a JSON file"}
    return entry, files


def random_case(seed: int) -> Case:
    """A model with special tokens set in many random places at once."""
    rng = random.Random(seed)
    added = [added_token(IDS[text], text, special=rng.random() < 0.8, normalized=rng.random() < 0.2) for text in TOKENS]
    normalizer = rng.choice(
        [
            None,
            {"type": "NFC"},
            {"type": "Lowercase"},
            {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]},
        ]
    )
    tokenizer = byte_level_tokenizer(added=added, post_processor=random_post_processor(rng), normalizer=normalizer)
    files: dict[str, Any] = {"tokenizer.json": tokenizer}
    if rng.random() < 0.9:
        entry, template_files = random_chat_templates(rng)
        files |= {"tokenizer_config.json": {**random_tokenizer_config(rng, added), **entry}, **template_files}
    if rng.random() < 0.1:
        files["special_tokens_map.json"] = {"bos_token": "<s>", "additional_special_tokens": ["<|eot|>"]}
    ids = {f"{role}_token_id": rng.choice([BASE, BASE + 1, None, 5]) for role in ROLES if rng.random() < 0.4}
    if rng.random() < 0.15:
        ids["text_config"] = {"bos_token_id": 7, "eos_token_id": 8}
    ids.setdefault("eos_token_id", BASE)  # without one, mergeforge looks further than the converter: see test_vocab.py
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = BASE
    ids["bos_token_id"] = ids.get("bos_token_id") or BASE
    settings = config("LlamaForCausalLM", BASE + len(TOKENS) + rng.choice([0, 0, 4]), **ids)
    return Case(settings, files, "llama", pre="gpt-2")
