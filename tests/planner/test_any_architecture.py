"""Tiny models of many families merged half and half, against the mean of their state dicts.

By default a few of them; all with `-m slow`. No engine code knows a family here: names and shapes decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.more_architectures import MORE
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES, Architecture, cnn, unet

import mergeforge

STEM = {"safetensors": "model", "bin": "pytorch_model"}
QUICK = ("llama", "mixtral", "mamba2", "bert", "t5", "clip", "resnet", "gemma3")
CASES = [
    pytest.param(one, id=one.kind, marks=[] if one.kind in QUICK else [pytest.mark.slow])
    for one in [*ARCHITECTURES, *MORE]
]


def saved(case: Architecture, root: Path) -> list[Any]:
    """Two random models, saved in root/a and root/b."""
    models = [case.make(seed) for seed in (1, 2)]
    with quiet():
        for model, name in zip(models, "ab", strict=True):
            model.save_pretrained(root / name)
    return models


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def mean(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of the float tensors; others are the first's."""
    return {name: (value + other[name]) / 2 if value.is_floating_point() else value for name, value in one.items()}


def half(root: Path, *names: str) -> dict[str, Any]:
    """The recipe that averages models in a folder."""
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in names]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """No tensor is lost, none is new, and values are equal to 1e-6."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_two(case: Architecture, tmp_path: Path) -> None:
    """Tensors, and what the model that transformers loads makes of an input, are those of the mean."""
    first, second = saved(case, tmp_path)
    out = mergeforge.merge(half(tmp_path, "a", "b"), out=tmp_path / "out", device="cpu", threads=1)
    agree(stored(out), mean(stored(tmp_path / "a"), stored(tmp_path / "b")))
    loaded, report = case.load(out)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    first.load_state_dict(mean(first.state_dict(), second.state_dict()))
    torch.testing.assert_close(case.outputs(loaded), case.outputs(first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_ties_loses_no_tensor(case: Architecture, tmp_path: Path) -> None:
    saved(case, tmp_path)
    models = [{"model": str(tmp_path / "b"), "parameters": {"weight": 1, "density": 0.5}}]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "a"), "models": models}
    out = mergeforge.merge(recipe, out=tmp_path / "out", device="cpu", threads=1)
    assert stored(out).keys() == stored(tmp_path / "a").keys()
    assert not case.load(out)[1]["missing_keys"]


@pytest.mark.parametrize("make", [unet, cnn])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("folder", [False, True])
def test_bare_tensors_are_a_model(make: Any, suffix: str, folder: bool, tmp_path: Path) -> None:
    """Of a Stable Diffusion UNet, and of a net with batch norms: a file, or a folder with nothing else in it."""
    models = {name: make(seed) for seed, name in enumerate("ab")}
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        write = save_file if suffix == "safetensors" else torch.save
        write(tensors, tmp_path / name / f"{STEM[suffix]}.{suffix}")
    names = [name if folder else f"{name}/{STEM[suffix]}.{suffix}" for name in "ab"]
    out = mergeforge.merge(half(tmp_path, *names), out=tmp_path / "out", device="cpu", allow_pickle=suffix == "bin")
    agree(stored(out), mean(models["a"], models["b"]))
