"""Added and special tokens of random tokenizer files, against transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.tokenizer import ModelTokenizer
from mergeforge.tokenizer.hf_files import FLAGS, added_tokens, named_tokens
from mergeforge.tokenizer.hf_vocabulary import read_vocabulary

TOKENS = ["<s>", "</s>", "<|eot|>", "<pad>", "[X]", "[Y]", "x"]
ROLES = ["bos", "eos", "unk", "pad", "eot", "image"]


def token(chance: random.Random, text: str) -> dict[str, Any]:
    """An added token with random flags."""
    return {"content": text, **{name: chance.random() < 0.4 for name in FLAGS}}


def entry(chance: random.Random) -> Any:
    """A token as tokenizer_config.json holds it: a string or an AddedToken."""
    text = chance.choice(TOKENS)
    return text if chance.random() < 0.7 else {"__type": "AddedToken", **token(chance, text)}


def entries(chance: random.Random) -> list[Any]:
    return [entry(chance) for _ in range(chance.randrange(4))]


def texts(values: list[Any]) -> list[str]:
    return [value if isinstance(value, str) else value["content"] for value in values]


def random_files(seed: int) -> dict[str, Any]:
    """tokenizer.json, tokenizer_config.json and, now and then, special_tokens_map.json."""
    chance = random.Random(seed)
    words = ["a", "b", "x", "y", *(["<s>"] if chance.random() < 0.3 else [])]
    vocab = {word: number for number, word in enumerate(words)}
    stored, free = [], len(vocab)
    for text in chance.sample(TOKENS, chance.choice([0, 2, 3, 4])):
        number = vocab.get(text, free)
        stored.append({"id": number, **token(chance, text)})
        free = max(free, number + 1)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{role}_token": entry(chance) for role in ROLES if chance.random() < 0.4}
    if chance.random() < 0.4:
        config["additional_special_tokens"] = entries(chance)
    if chance.random() < 0.4:
        named = {f"{role}_token": chance.choice(TOKENS) for role in ("img", "aud") if chance.random() < 0.5}
        config["extra_special_tokens"] = entries(chance) if chance.random() < 0.6 else named
    if chance.random() < 0.3:
        listed = [one for one in stored if chance.random() < 0.7]
        config["added_tokens_decoder"] = {str(one["id"]): token(chance, one["content"]) for one in listed}
        if chance.random() < 0.3:
            config["added_tokens_decoder"][str(free)] = token(chance, "<new>")
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    files: dict[str, Any] = {"tokenizer.json": {"version": "1.0", "added_tokens": stored, "model": model}}
    files["tokenizer_config.json"] = config
    if chance.random() < 0.3:
        special_map: dict[str, Any] = {f"{role}_token": chance.choice(TOKENS) for role in ("bos", "pad")}
        if chance.random() < 0.5:
            special_map["pad_token"] = token(chance, "<pad>")
        for name in ("additional_special_tokens", "extra_special_tokens"):
            if chance.random() < 0.4:
                special_map[name] = texts(entries(chance))
        files["special_tokens_map.json"] = special_map
    return files


@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)], ids=str)
def test_added_tokens_match_transformers(seeds: range, tmp_path: Path) -> None:
    """Ids and flags from the one reader, as the merge and the GGUF vocabulary use it."""
    for seed in seeds:
        files = random_files(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        paths = {name: folder / name for name in files}
        decoder = AutoTokenizer.from_pretrained(folder).added_tokens_decoder
        expected = {
            token.content: (number, {name: getattr(token, name) for name in FLAGS}) for number, token in decoder.items()
        }
        vocabulary = read_vocabulary(ModelTokenizer("m", paths, 1000))
        assert {text: (vocabulary.ids[text], flags) for text, flags in vocabulary.added.items()} == expected, seed
        gguf_tokens = TokenizerFiles(paths, {}, 1000).added
        assert {token.text: (number, token.flags) for number, token in gguf_tokens.items()} == expected, seed


@pytest.mark.parametrize(
    ("config", "special_map", "unnamed"),
    [
        ({"additional_special_tokens": ["a"]}, {}, ("a",)),
        ({"additional_special_tokens": ["a"], "extra_special_tokens": ["b"]}, {}, ("b",)),
        ({"additional_special_tokens": ["a"], "extra_special_tokens": []}, {}, ("a",)),
        ({"extra_special_tokens": ["a"]}, {"extra_special_tokens": ["b", "a"]}, ("a", "b")),
        ({"extra_special_tokens": ["a"], "added_tokens_decoder": {}}, {"extra_special_tokens": ["b"]}, ("a",)),
    ],
)
def test_additional_special_tokens_count_only_without_extra_ones(
    config: dict[str, Any], special_map: dict[str, Any], unnamed: tuple[str, ...]
) -> None:
    assert named_tokens(config, special_map).unnamed_texts == unnamed


def test_extra_special_tokens_as_a_mapping_are_roles() -> None:
    named = named_tokens({"bos_token": "<s>", "extra_special_tokens": {"image_token": "<image>"}}, {})
    assert (named.role_texts, named.unnamed) == ({"bos": "<s>", "image": "<image>"}, ())
    assert list(added_tokens({"a": 0}, [], {"extra_special_tokens": {"image_token": "<image>"}}, {})) == ["<image>"]
