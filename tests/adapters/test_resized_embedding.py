"""Adapters with rows for new tokens: the vocabulary grows by these rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.errors import SourceError

NEW = torch.arange(3 * 64).view(3, 64) / 64  # the tiny model has 320 rows of 64


def write_tokens(folder: Path, indices: list[int]) -> Path:
    folder.mkdir()
    prefix = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    save_file({prefix: NEW, head: NEW.clone() * 2}, folder / "adapter_model.safetensors")
    ids = {"embed_tokens": indices, "lm_head": indices}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [], "trainable_token_indices": ids}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("threads", [1, 3])
def test_new_token_rows_follow_the_base_rows(threads: int, models: Path) -> None:
    adapter = write_tokens(models / "tokens", [321, 5, 320])
    out = mergeforge.merge(
        {"base_model": "base", "adapters": [str(adapter)]}, out="out", memory="32MiB", threads=threads
    )
    before, now = load_file("base/model.safetensors"), load_file(out / "model.safetensors")
    for name, factor in (("model.embed_tokens.weight", 1), ("lm_head.weight", 2)):
        expected = torch.cat([before[name], before[name][:2]])
        expected[[321, 5, 320]] = (NEW * factor).to(torch.bfloat16)
        assert now[name].equal(expected), name
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 322


def test_new_tokens_with_a_gap_are_refused(models: Path) -> None:
    adapter = write_tokens(models / "tokens", [5, 320, 322])
    with pytest.raises(SourceError, match="embed_tokens is made for shape"):
        mergeforge.plan({"base_model": "base", "adapters": [str(adapter)]}, out="out")


def test_two_adapters_with_different_new_rows_are_refused(models: Path) -> None:
    folder, two = write_tokens(models / "one", [5, 320, 321]), write_tokens(models / "two", [321, 320, 5])
    with pytest.raises(SourceError, match=r"both replace"):
        mergeforge.plan({"base_model": "base", "adapters": [str(folder), str(two)]}, out="out")
