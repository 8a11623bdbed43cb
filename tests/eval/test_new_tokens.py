"""Adapters with new tokens: the base's vocabulary grows for them, and the base's own answers stay the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import random_rows

from mergeforge import eval
from mergeforge.errors import SourceError
from mergeforge.eval import TokenRow

NEW = ["<think>", "</think>"]
VARIANTS: dict[str, dict[str, Any]] = {
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [320, 321], "lm_head": [320, 321]}},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def make(base: Path, folder: Path, rows: int, settings: dict[str, Any]) -> object:
    """Save an adapter with two new tokens by peft; returns the model that it was saved from."""
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


def rows_with_new_tokens() -> list[TokenRow]:
    rows = random_rows(6)
    for row in rows:
        row.tokens[1], row.tokens[-2] = 320, 321
        row.labels[-2] = 321
    return rows


@pytest.mark.parametrize("rows", [322, 384])
@pytest.mark.parametrize("variant", VARIANTS)
def test_new_tokens_score_as_in_peft(base: Path, tmp_path: Path, variant: str, rows: int) -> None:
    from test_logprobs_against_transformers import losses

    wrapped = make(base, tmp_path / "adapter", rows, VARIANTS[variant])
    model = eval.open_model(tmp_path / "adapter")
    data = rows_with_new_tokens()
    evaluation = eval.evaluate(model, data)
    assert [row.nll for row in evaluation.rows] == pytest.approx(losses(wrapped, data), rel=1e-5)
    assert len(model.tokenizer) == 322 and model.tokenizer.encode("<think>") == [320]


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_is_unchanged(base: Path, tmp_path: Path, variant: str) -> None:
    make(base, tmp_path / "adapter", 322, VARIANTS[variant])
    model = eval.open_model(tmp_path / "adapter")
    assert isinstance(model, eval.TransformersModel)
    data = random_rows(6)
    expected = eval.evaluate(base, data)
    evaluation = eval.evaluate(model.base(), data)
    assert [row.nll for row in evaluation.rows] == pytest.approx([row.nll for row in expected.rows], rel=1e-6)
    messages = [{"role": "user", "content": "the hen"}]
    greedy = eval.Sampling(12, 0)
    assert model.base().chat(messages, greedy).text == eval.open_model(base).chat(messages, greedy).text
    assert len(model.base().tokenizer) < 322
    with pytest.raises(SourceError, match="token 321"):
        eval.evaluate(model.base(), rows_with_new_tokens())


def test_loading_twice_gives_the_same_scores(base: Path, tmp_path: Path) -> None:
    """Embedding rows that the adapter does not store start as the mean, not at random."""
    make(base, tmp_path / "adapter", 384, VARIANTS["trainable tokens"])
    data = rows_with_new_tokens()
    one, two = (eval.evaluate(tmp_path / "adapter", data) for _ in range(2))
    assert [row.nll for row in one.rows] == [row.nll for row in two.rows]
