"""Scores of padded batches, the head in chunks, against transformers' logits of each row alone, family by family."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.tiny_architectures import ARCHITECTURES, Architecture, quiet

from mergeforge.data import Example
from mergeforge.eval import logprobs as scoring

CAUSAL = [one for one in ARCHITECTURES if one.auto == "AutoModelForCausalLM"]


def rows() -> list[Example]:
    random = np.random.default_rng(0)
    found = []
    for length in (5, 23, 12, 40, 3):
        tokens = random.integers(6, 96, length).astype(np.int32)
        labels = tokens.copy()
        labels[: length // 2] = -100
        found.append(Example(tokens, labels))
    return found


@pytest.mark.parametrize("architecture", CAUSAL, ids=lambda one: one.kind)
def test_scores(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    with quiet():
        model = architecture.make(0)
        expected = [alone(model, row) for row in rows()]
        monkeypatch.setattr(scoring, "LOGITS", 7 * 96)
        found = dict(scoring.scores(model, rows(), batch=3, device="cpu"))
    assert [found[at].nll for at in range(5)] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert [found[at].correct for at in range(5)] == [correct for _, correct in expected]


def alone(model: torch.nn.Module, row: Example) -> tuple[float, int]:
    """(negative log-likelihood, tokens that are the likeliest) of one row."""
    tokens, at = torch.from_numpy(row.tokens).long(), torch.from_numpy(np.flatnonzero(row.labels >= 0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(tokens[None], use_cache=False).logits[0].double()
    logprobs = logits[at - 1].log_softmax(-1)
    return -logprobs.gather(1, tokens[at][:, None]).sum().item(), int((logits[at - 1].argmax(-1) == tokens[at]).sum())
