"""Models whose special tokens and chat templates are set in many places at once, by seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from support.tokenizer_folders import BYTE_LEVEL, GPT2_BYTE_LEVEL, byte_level, config, special, template

BASE = 480  # tokens of the byte-level model


@dataclass(frozen=True)
class Case:
    """A model to convert, how we are to see it, and which keys differ on purpose."""

    settings: Mapping[str, Any]
    files: Mapping[str, Any]
    kind: str
    pre: str | None = None  # given to both
    family: str = ""
    better: tuple[str, ...] = field(default=())


def listed(*tokens: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's added_tokens_decoder."""
    return {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in tokens}


TOKENS = ("<s>", "</s>", "<|eot|>", "<pad>", "[SEP]", "[CLS]")
IDS = {text: BASE + i for i, text in enumerate(TOKENS)}
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot")


def any_template(chance: random.Random) -> dict[str, Any]:
    """A TemplateProcessing with tokens around and between the texts, or without."""

    def part(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    first, last = chance.choice([None, *TOKENS[:3]]), chance.choice([None, *TOKENS[1:5]])
    made = template(first, last, IDS)
    if chance.random() < 0.5:
        between = [part(chance.choice(TOKENS)) for _ in range(chance.choice([0, 1, 2, 3]))]
        before = [part(first)] if first and chance.random() < 0.8 else []
        after = [part(last)] if last and chance.random() < 0.8 else []
        one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        made["pair"] = [*before, one, *between, two, *after]
    used = {part["SpecialToken"]["id"] for part in made["single"] + made["pair"] if "SpecialToken" in part}
    made["special_tokens"] = {text: {"id": text, "ids": [IDS[text]], "tokens": [text]} for text in used}
    return made


def any_post_processor(chance: random.Random) -> dict[str, Any] | None:
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", IDS["</s>"]], "cls": ["<s>", IDS["<s>"]]}
    return chance.choice(
        [
            None,
            GPT2_BYTE_LEVEL,
            {**roberta, "trim_offsets": True, "add_prefix_space": False},
            any_template(chance),
            {"type": "Sequence", "processors": [GPT2_BYTE_LEVEL, any_template(chance)]},
            {"type": "Sequence", "processors": [BYTE_LEVEL, any_template(chance)]},
        ]
    )


def any_tokenizer_config(chance: random.Random, added: list[dict[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in ROLES:
        if chance.random() < 0.45:
            text = chance.choice(TOKENS)
            whole = {"__type": "AddedToken", **{k: v for k, v in special(0, text).items() if k != "id"}}
            names[f"{role}_token"] = chance.choice([text, text, text, whole, None])
        if chance.random() < 0.2:
            names[f"add_{role}_token"] = chance.random() < 0.5
    if chance.random() < 0.3:
        names["additional_special_tokens"] = chance.sample(TOKENS, 2)
    if chance.random() < 0.2:
        names["added_tokens_decoder"] = listed(*({**one, "special": chance.random() < 0.5} for one in added))
    return names


def any_templates(chance: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chat templates: an entry of tokenizer_config.json, and files."""
    named = [{"name": name, "template": name.upper()} for name in ("default", "tool use", "rag")]
    entry = chance.choice(
        [{}, {}, {}, {"chat_template": "{{ a }}"}, {"chat_template": named}, {"chat_template": named[1:]}]
    )
    files: dict[str, Any] = {}
    if chance.random() < 0.3:
        files["chat_template.jinja"] = "of a jinja file"
        if chance.random() < 0.5:
            files["additional_chat_templates/a-b.jinja"] = "AB"  # with two the order is the folder's
    if chance.random() < 0.3:
        files["chat_template.json"] = {"chat_template": "of a JSON file"}
    return entry, files


def any_case(seed: int) -> Case:
    """Special tokens set in many places at once, at random."""
    chance = random.Random(seed)
    added = [special(IDS[text], text, on=chance.random() < 0.8, normalized=chance.random() < 0.2) for text in TOKENS]
    normalizer = chance.choice(
        [
            None,
            {"type": "NFC"},
            {"type": "Lowercase"},
            {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]},
        ]
    )
    tokenizer = byte_level(added=added, post_processor=any_post_processor(chance), normalizer=normalizer)
    files: dict[str, Any] = {"tokenizer.json": tokenizer}
    if chance.random() < 0.9:
        entry, more = any_templates(chance)
        files |= {"tokenizer_config.json": {**any_tokenizer_config(chance, added), **entry}, **more}
    if chance.random() < 0.1:
        files["special_tokens_map.json"] = {"bos_token": "<s>", "additional_special_tokens": ["<|eot|>"]}
    ids = {f"{role}_token_id": chance.choice([BASE, BASE + 1, None, 5]) for role in ROLES if chance.random() < 0.4}
    if chance.random() < 0.15:
        ids["text_config"] = {"bos_token_id": 7, "eos_token_id": 8}
    ids.setdefault("eos_token_id", BASE)  # without any, ours is found elsewhere: test_vocab has that
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = BASE
    ids["bos_token_id"] = ids.get("bos_token_id") or BASE
    settings = config("LlamaForCausalLM", BASE + len(TOKENS) + chance.choice([0, 0, 4]), **ids)
    return Case(settings, files, "llama", pre="gpt-2")
