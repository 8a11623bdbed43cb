"""Tokenizers that transformers loads otherwise than their tokenizer.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mergeforge.core.messages import WarningText
from mergeforge.data import load_tokenizer
from mergeforge.data.tokenizer_check import SAMPLE_TEXTS, encoder, find_difference
from mergeforge.data.tokenizers import load_warnings
from mergeforge.operations.synthetic_models import SHAPES, write_tokenizer


def write_folder(folder: Path, model_type: str, **config: Any) -> Path:
    """A tokenizer that joins the digits 1 and 2, which Qwen2's own rules keep apart."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["model"]["vocab"]["12"] = max(stored["model"]["vocab"].values()) + 1
    stored["model"]["merges"].append(["1", "2"])
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    facts = SHAPES["tiny"].config("F32") | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2"])
def test_text_is_read_as_the_file_says(model_type: str, tmp_path: Path) -> None:
    """The loaded tokenizer against the file, on every sample text; a warning where transformers differs."""
    folder = write_folder(tmp_path / "base", model_type)
    tokenizer = load_tokenizer(str(folder))
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in SAMPLE_TEXTS:
        assert encoder(tokenizer)(text) == stored.encode(text, add_special_tokens=False).ids
    warnings = load_warnings(tokenizer)
    assert len(warnings) == (model_type == "qwen2")
    assert all(isinstance(text, WarningText) and "Qwen2Tokenizer reads '1234567890" in text for text in warnings)


def test_a_setting_that_overrules_the_file_is_kept_with_a_warning(tmp_path: Path) -> None:
    """transformers corrects the rules of large Mistral vocabularies where tokenizer_config.json says so."""
    folder = write_folder(tmp_path / "base", "mistral", fix_mistral_regex=True)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    first = max(stored["model"]["vocab"].values()) + 1
    stored["model"]["vocab"] |= {f"filler {at}": at for at in range(first, 100_100)}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert len(encoder(tokenizer)("12")) == 2
    assert "programs that read the file" in load_warnings(tokenizer)[0]


def test_the_first_different_word_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    one = encoder(load_tokenizer(str(tmp_path)))
    two = encoder(load_tokenizer(str(write_folder(tmp_path / "other", "llama"))))
    assert find_difference(one, one) is None
    difference = find_difference(one, two)
    assert difference and difference.text == "1234567890" and len(difference.first) == len(difference.second) + 1
