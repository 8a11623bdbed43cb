"""The packed, chunked path against transformers' own loss on each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_models import write_tiny
from transformers import AutoModelForCausalLM

from mergeforge.train.loop import chunked_loss, collate

ROWS = [(torch.arange(5, 5 + n) * 7 % 251, torch.arange(5, 5 + n) * 7 % 251) for n in (5, 9, 3, 12, 1)]


def masked(rows: collate.Rows) -> collate.Rows:
    """The first third of each row is a prompt."""
    found = []
    for tokens, labels in rows:
        labels = labels.clone()
        labels[: len(labels) // 3] = chunked_loss.IGNORE_INDEX
        found.append((tokens, labels))
    return found


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def plainly(model: Any, rows: collate.Rows) -> torch.Tensor:
    """Each row by itself through the stock model, its logits whole."""
    total, count = torch.zeros(()), 0
    for tokens, labels in rows:
        logits = model(input_ids=tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != chunked_loss.IGNORE_INDEX).sum())
    return total / count


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "cohere", "gpt2"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_packed_and_chunked_against_plain(family: str, chunk: int, tmp_path: Path) -> None:
    rows, model = masked(ROWS), AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, family)).float()
    expected = plainly(model, rows)
    expected.backward()
    wanted = gradients(model)
    assert collate.separates_packed_rows(model)
    assert chunked_loss.install_chunked_loss(model, chunk=chunk) == ""
    packed = collate.collate([rows[:3], rows[3:]], pad=0)
    count = (packed["labels"] != chunked_loss.IGNORE_INDEX).sum()
    found = model(**packed, num_items_in_batch=count)["loss"]
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-6
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_no_label_gives_a_loss_of_zero_that_has_a_graph(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, "llama"))
    chunked_loss.install_chunked_loss(model, chunk=4)
    batch = collate.collate([[(torch.arange(6), torch.full((6,), chunked_loss.IGNORE_INDEX))]], pad=0)
    found = model(**batch, num_items_in_batch=1)["loss"]
    found.backward()
    assert found.item() == 0


def test_a_model_that_sees_other_rows_is_found_out(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, "llama")).eval()
    stock = model.forward
    model.forward = lambda input_ids, position_ids, **given: stock(input_ids=input_ids, **given)
    assert not collate.separates_packed_rows(model)
