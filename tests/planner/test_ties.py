"""Tied tensors: what is stored decides, not the flag; a class whose ties are not known is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_lab import Lab
from support.tiny_architectures import ARCHITECTURES, Architecture

import mergeforge
from mergeforge.errors import SourceError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLAG = "tie_word_embeddings"


def fold(lab: Lab, base: Path, adapter: Path) -> Path:
    return mergeforge.merge(base_model=str(base), adapters=[str(adapter)], out=lab.out(), device="cpu", threads=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


def changed(folder: Path, stored: dict[str, torch.Tensor], to: Path, **changes: Any) -> Path:
    """The model with other tensors and another config."""
    to.mkdir()
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(config(folder) | changes))
    return to


def agree(lab: Lab, out: Path, model: Any) -> None:
    torch.testing.assert_close(lab.logits(lab.load(out)), lab.logits(model), rtol=1e-4, atol=1e-5)


def test_two_stored_heads_are_two_tensors_whatever_the_flag_says(lab: Lab, tmp_path: Path) -> None:
    """Logits of the fold are PEFT's; the flag changes only where one of the two tensors does."""
    base = lab.base("llama")
    lying = changed(base, tensors(base), tmp_path / "base", **{FLAG: True})
    layers, embedding = lab.train(lying), lab.train(lying, target_modules=["embed_tokens"])
    outs = [fold(lab, lying, one.folder) for one in (layers, embedding)]
    assert [config(out)[FLAG] for out in outs] == [True, False]
    for out, one in zip(outs, (layers, embedding), strict=True):
        agree(lab, out, one.model)


def test_a_head_may_be_stored_without_its_embedding(lab: Lab, tmp_path: Path) -> None:
    """A tied model of which only lm_head is stored: an adapter of the embedding leaves the head alone."""
    base = lab.base("llama-tied")
    stored = tensors(base)
    stored[HEAD] = stored.pop(EMBEDDING)
    alone = changed(base, stored, tmp_path / "base")
    layers, embedding = lab.train(alone), lab.train(alone, target_modules=["embed_tokens"])
    out = fold(lab, alone, layers.folder)
    assert tensors(out).keys() == stored.keys() and config(out)[FLAG] is True
    agree(lab, out, layers.model)
    out = fold(lab, alone, embedding.folder)
    assert tensors(out)[HEAD].equal(stored[HEAD]) and config(out)[FLAG] is False
    agree(lab, out, embedding.model)


def test_a_class_that_is_not_known_keeps_its_ties_or_is_refused(lab: Lab, tmp_path: Path) -> None:
    base = lab.base("llama-tied")
    made_up = {"architectures": ["MadeUpForCausalLM"]}
    unknown = changed(base, tensors(base), tmp_path / "base", **made_up)
    out = fold(lab, unknown, lab.train(base).folder)
    assert config(out)[FLAG] is True and HEAD not in tensors(out)
    with pytest.raises(SourceError, match="how the class MadeUpForCausalLM loads the result is not known"):
        fold(lab, unknown, lab.train(base, target_modules=["embed_tokens"]).folder)


def case(kind: str) -> Architecture:
    return next(one for one in ARCHITECTURES if one.kind == kind)


@pytest.mark.parametrize("kind, head", [("bart", HEAD), ("bert", "cls.predictions.decoder.weight")])
def test_a_tied_model_merges_with_one_that_stores_a_head(kind: str, head: str, lab: Lab, tmp_path: Path) -> None:
    """The mean of the two: each name of the tied tensor is averaged with what the other model has there."""
    with lab.quiet():
        models = {name: case(kind).make(seed) for seed, name in ((1, "a"), (2, "b"))}
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
    names = list(models["a"].state_dict())
    (tmp_path / "b" / "model.safetensors").unlink()
    state = {name: models["b"].state_dict()[name].clone() for name in names}
    state[head] += 1
    save_file(state, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "dtype": "float32"}
    out = mergeforge.merge({**recipe, "parameters": {"weight": 0.5}}, out=tmp_path / "out", device="cpu", threads=1)
    loaded, report = case(kind).load(out)
    assert not any(report[which] for which in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for name in names:
        expected = (models["a"].state_dict()[name] + state[name]) / 2
        torch.testing.assert_close(loaded.state_dict()[name], expected, rtol=1e-6, atol=1e-6)
    assert config(out)[FLAG] is False


def test_a_class_that_computes_by_the_flag_keeps_it(lab: Lab, tmp_path: Path) -> None:
    """T5 scales the decoder's output by it."""
    import peft

    with lab.quiet():
        case("t5").make(1).save_pretrained(tmp_path / "base")
        model, _ = case("t5").load(tmp_path / "base")
        trained = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"], modules_to_save=["lm_head"]))
        trained.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.3
        trained.eval().save_pretrained(tmp_path / "adapter")
    out = fold(lab, tmp_path / "base", tmp_path / "adapter")
    assert config(out)[FLAG] == config(tmp_path / "base")[FLAG]
    loaded, _ = case("t5").load(out)
    torch.testing.assert_close(case("t5").outputs(loaded), case("t5").outputs(trained.base_model.model))
