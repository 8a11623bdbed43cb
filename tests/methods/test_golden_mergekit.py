"""Merges against what mergekit 0.1.5 made of the same recipes, as tools/golden_mergekit recorded it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.golden_mergekit import GOLDEN, PER_TENSOR, samples
from test_against_mergekit import Peers
from test_slices_against_mergekit import Both


@cache
def golden(part: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(GOLDEN.read_text())[part]
    return found


def check(tensors: Mapping[str, torch.Tensor], recorded: str) -> None:
    """Every sample within 1e-6 of its tensor's largest."""
    theirs = np.frombuffer(base64.b64decode(recorded), dtype="<f4").reshape(-1, PER_TENSOR)
    ours = samples(tensors)
    assert ours.shape == theirs.shape
    largest = np.abs(theirs).max(axis=1, keepdims=True)
    apart = np.abs(ours - theirs) > 1e-6 * largest
    assert not apart.any(), (
        f"{sorted(tensors)[int(apart.any(axis=1).argmax())]}: {ours[apart][:3]}, not {theirs[apart][:3]}"
    )


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    made = Peers(tmp_path_factory.mktemp("methods"))
    made.write()
    return made


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    made = Both(tmp_path_factory.mktemp("stacks"))
    made.write()
    return made


@pytest.mark.parametrize("name", golden("methods"))
def test_methods(peers: Peers, name: str) -> None:
    check(peers.ours(name), golden("methods")[name])


@pytest.mark.parametrize("name", golden("stacks"))
def test_stacks(both: Both, name: str) -> None:
    check(load_file(both.ours(name) / "model.safetensors"), golden("stacks")[name])
