"""Scores of padded batches with a chunked head, compared with transformers' logits of each row, per architecture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES, Architecture

from mergeforge.data import Example
from mergeforge.eval import logprobs

CAUSAL = [architecture for architecture in ARCHITECTURES if architecture.auto == "AutoModelForCausalLM"]


def rows() -> list[Example]:
    random = np.random.default_rng(0)
    examples = []
    for length in (5, 23, 12, 40, 3):
        tokens = random.integers(6, 96, length).astype(np.int32)
        labels = tokens.copy()
        labels[: length // 2] = -100
        examples.append(Example(tokens, labels))
    return examples


@pytest.mark.parametrize("architecture", CAUSAL, ids=lambda architecture: architecture.kind)
def test_scores(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    with quiet():
        model = architecture.make(0)
        expected = [score_alone(model, row) for row in rows()]
        monkeypatch.setattr(logprobs, "MAX_LOGITS", 7 * 96)
        scores = dict(logprobs.score_rows(model, rows(), batch=3, device="cpu"))
    assert [scores[index].nll for index in range(5)] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert [scores[index].correct for index in range(5)] == [correct for _, correct in expected]


def score_alone(model: torch.nn.Module, row: Example) -> tuple[float, int]:
    """(negative log-likelihood, top-1 hits) of one row."""
    tokens, at = torch.from_numpy(row.tokens).long(), torch.from_numpy(np.flatnonzero(row.labels >= 0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(tokens[None], use_cache=False).logits[0].double()
    expected = logits[at - 1].log_softmax(-1)
    return -expected.gather(1, tokens[at][:, None]).sum().item(), int((logits[at - 1].argmax(-1) == tokens[at]).sum())
