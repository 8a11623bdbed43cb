"""Adapters that bring tokens of their own: the base's vocabulary grows for them, and its own answers stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import random_rows

from mergeforge import eval
from mergeforge.errors import SourceError
from mergeforge.eval import Row

NEW = ["<think>", "</think>"]
WAYS: dict[str, dict[str, Any]] = {
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [320, 321], "lm_head": [320, 321]}},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def make(base: Path, folder: Path, rows: int, settings: dict[str, Any]) -> object:
    """An adapter with two new tokens, as peft saves it; the model that it was saved from."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<unused{at}>" for at in range(320 - len(tokenizer))] + NEW, special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    asked = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**asked))
        for tensor in wrapped.parameters():
            if tensor.requires_grad:
                torch.nn.init.normal_(tensor, std=0.05)
        wrapped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return wrapped.eval()


def rows_with_new_tokens() -> list[Row]:
    rows = random_rows(6)
    for row in rows:
        row.tokens[1], row.tokens[-2] = 320, 321
        row.labels[-2] = 321
    return rows


@pytest.mark.parametrize("rows", [322, 384])
@pytest.mark.parametrize("way", WAYS)
def test_new_tokens_score_as_in_peft(base: Path, tmp_path: Path, way: str, rows: int) -> None:
    from test_logprobs_against_transformers import losses

    wrapped = make(base, tmp_path / "adapter", rows, WAYS[way])
    model = eval.open_model(tmp_path / "adapter")
    data = rows_with_new_tokens()
    found = eval.evaluate(model, data)
    assert [row.nll for row in found.rows] == pytest.approx(losses(wrapped, data), rel=1e-5)
    assert len(model.tokenizer) == 322 and model.tokenizer.encode("<think>") == [320]


@pytest.mark.parametrize("way", WAYS)
def test_the_base_is_what_it_was(base: Path, tmp_path: Path, way: str) -> None:
    make(base, tmp_path / "adapter", 322, WAYS[way])
    model = eval.open_model(tmp_path / "adapter")
    assert isinstance(model, eval.TorchModel)
    data = random_rows(6)
    wanted = eval.evaluate(base, data)
    found = eval.evaluate(model.base(), data)
    assert [row.nll for row in found.rows] == pytest.approx([row.nll for row in wanted.rows], rel=1e-6)
    messages = [{"role": "user", "content": "the hen"}]
    greedy = eval.Sampling(12, 0)
    assert model.base().reply(messages, greedy).text == eval.open_model(base).reply(messages, greedy).text
    assert len(model.base().tokenizer) < 322
    with pytest.raises(SourceError, match="token 321"):
        eval.evaluate(model.base(), rows_with_new_tokens())


def test_every_load_is_the_same(base: Path, tmp_path: Path) -> None:
    """Rows that the adapter does not hold start as the mean, not at random."""
    make(base, tmp_path / "adapter", 384, WAYS["trainable tokens"])
    data = rows_with_new_tokens()
    one, two = (eval.evaluate(tmp_path / "adapter", data) for _ in range(2))
    assert [row.nll for row in one.rows] == [row.nll for row in two.rows]
