"""extract-lora against mergekit-extract-lora 0.1.5: the same error in every module."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from pathlib import Path

import pytest
import torch
from support.changed_models import save_pair, tensors
from support.peers import peer_program

from mergeforge.lora.extract import extract, plan_extraction, read_report

pytestmark = pytest.mark.peers
RANK = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("peers"), "llama", 20, also=("embed_tokens",))


@pytest.fixture(scope="module")
def theirs(pair: tuple[Path, Path]) -> Path:
    """mergekit's adapter of the same two models."""
    script, out = peer_program("mergekit-extract-lora"), pair[0].parent / "theirs"
    options = ["--model", str(pair[1]), "--base-model", str(pair[0]), "--out-path", str(out), "--max-rank", str(RANK)]
    subprocess.run([script, *options], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_error_of_every_module_equals_mergekits(
    pair: tuple[Path, Path], theirs: Path, tmp_path: Path, svd: str
) -> None:
    plan = plan_extraction(str(pair[1]), str(pair[0]), tmp_path / "out", rank=RANK, svd=svd, device="cpu")
    deque(extract(plan), maxlen=0)
    base, tuned, stored = tensors(pair[0]), tensors(pair[1]), tensors(theirs, "adapter_model.safetensors")
    modules = read_report(plan)["modules"]
    assert {f"base_model.model.{module}.lora_A.weight" for module in modules} == {
        name for name in stored if "lora_A" in name
    }
    for module, entry in modules.items():
        change = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        a, b = (stored[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
        assert entry["error"] == pytest.approx(
            float((change - b @ a).norm() / change.norm()), rel=1e-5 if svd == "exact" else 0.01
        )
        ours = tensors(tmp_path / "out", "adapter_model.safetensors")[f"base_model.model.{module}.lora_A.weight"]
        assert torch.allclose(ours.norm(dim=1), a.norm(dim=1), rtol=1e-3 if svd == "exact" else 0.2)  # sqrt(S) alike


def test_embeddings_are_saved_as_by_mergekit(pair: tuple[Path, Path], theirs: Path, tmp_path: Path) -> None:
    plan = plan_extraction(str(pair[1]), str(pair[0]), tmp_path / "out", rank=RANK, device="cpu")
    deque(extract(plan), maxlen=0)
    name = "base_model.model.model.embed_tokens.weight"
    ours, stored = (tensors(folder, "adapter_model.safetensors") for folder in (tmp_path / "out", theirs))
    assert torch.equal(ours[name], stored[name])
    assert "embed_tokens" in json.loads((theirs / "adapter_config.json").read_text())["modules_to_save"]
