"""The packed, chunked loss against transformers' own loss on each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_models import write_tiny
from transformers import AutoModelForCausalLM

from mergeforge.train.loop import chunked_loss, collate

TOKENS = [torch.arange(5, 5 + n) * 7 % 251 for n in (5, 9, 3, 12, 1)]
ROWS = [collate.Row(tokens, tokens) for tokens in TOKENS]
WEIGHTED_ROWS = [collate.Row(tokens, tokens, 0.3 * number) for number, tokens in enumerate(TOKENS, start=1)]


def masked(rows: collate.Rows) -> collate.Rows:
    """The rows with the first third of each as its prompt."""
    masked_rows = []
    for row in rows:
        labels = row.labels.clone()
        labels[: len(labels) // 3] = chunked_loss.IGNORE_INDEX
        masked_rows.append(row._replace(labels=labels))
    return masked_rows


def take_gradients(model: Any) -> dict[str, torch.Tensor]:
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return gradients


def plain_loss(model: Any, rows: collate.Rows) -> torch.Tensor:
    """Each row by itself through the stock model, all of its logits at once."""
    total, count = torch.zeros(()), 0.0
    for tokens, labels, weight in rows:
        logits = model(input_ids=tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum") * weight
        count += int((labels[1:] != chunked_loss.IGNORE_INDEX).sum()) * weight
    return total / count


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "cohere", "gpt2"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_packed_and_chunked_loss_equals_the_plain_one(family: str, chunk: int, tmp_path: Path) -> None:
    rows, model = masked(ROWS), AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, family)).float()
    plain = plain_loss(model, rows)
    plain.backward()
    plain_gradients = take_gradients(model)
    assert collate.separates_packed_rows(model)
    assert chunked_loss.install_chunked_loss(model, chunk=chunk) == ""
    packed = collate.collate([rows[:3], rows[3:]], pad=0)
    count = (packed["labels"] != chunked_loss.IGNORE_INDEX).sum()
    loss = model(**packed, num_items_in_batch=count)["loss"]
    loss.backward()
    assert abs(loss.item() - plain.item()) < 1e-6
    for name, gradient in take_gradients(model).items():
        assert (gradient - plain_gradients[name]).norm() <= 1e-5 * plain_gradients[name].norm() + 1e-9, name


@pytest.mark.parametrize("chunk", [0, 4])
def test_rows_count_by_their_weights(chunk: int, tmp_path: Path) -> None:
    """The loss of packed rows, against the weighted mean of the losses of single rows."""
    rows, model = masked(WEIGHTED_ROWS), AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, "llama")).float()
    expected = plain_loss(model, rows)
    assert abs(expected.item() - plain_loss(model, masked(ROWS)).item()) > 1e-3
    chunked_loss.install_chunked_loss(model, chunk=chunk)
    packed = collate.collate([rows[:3], rows[3:]], pad=0, weighted=True)
    count = packed["loss_weights"][packed["labels"] != chunked_loss.IGNORE_INDEX].sum()
    assert abs(model(**packed, num_items_in_batch=count)["loss"].item() - expected.item()) < 1e-6


def test_a_batch_without_labels_has_a_loss_of_zero_with_a_graph(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, "llama"))
    chunked_loss.install_chunked_loss(model, chunk=4)
    batch = collate.collate([[collate.Row(torch.arange(6), torch.full((6,), chunked_loss.IGNORE_INDEX))]], pad=0)
    loss = model(**batch, num_items_in_batch=1)["loss"]
    loss.backward()
    assert loss.item() == 0


def test_a_model_that_mixes_packed_rows_is_detected(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, "llama")).eval()
    model_forward = model.forward
    model.forward = lambda input_ids, position_ids, **inputs: model_forward(input_ids=input_ids, **inputs)
    assert not collate.separates_packed_rows(model)
