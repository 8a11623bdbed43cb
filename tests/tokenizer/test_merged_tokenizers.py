"""Whole merges with a tokenizer of their own: against mergekit's, the files beside the weights, every memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_llamas import EMBEDDING, HEAD, loaded, projected, write, write_all
from test_golden_tokenizers import GOLDEN
from test_tokenizers_against_mergekit import CASES, recipe

import mergeforge
from mergeforge.core import tensor_info
from mergeforge.errors import RecipeError, SourceError
from mergeforge.planner import tiling
from mergeforge.tensors import budget


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merges")
    write_all(root)
    return root


@pytest.mark.parametrize("name", GOLDEN)
def test_merges_match_mergekit(root: Path, name: str, tmp_path: Path) -> None:
    out = mergeforge.merge(recipe(root, CASES[name]), out=tmp_path / "out", device="cpu", threads=1)
    merged, vocabulary = load_file(out / "model.safetensors"), loaded(out).get_vocab()
    assert len(vocabulary) == GOLDEN[name]["tokens"]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(merged[EMBEDDING]) == GOLDEN[name]["rows"]
    for tensor, sums in zip((EMBEDDING, HEAD), GOLDEN[name]["sums"], strict=True):
        assert projected(merged[tensor], vocabulary) == pytest.approx(sums, rel=0, abs=1e-4)


@pytest.mark.parametrize(
    ("tokenizer", "method"),
    [({"source": "union"}, "ties"), ({"source": "base", "pad_to_multiple_of": 64}, "dare_ties")],
)
def test_result_does_not_depend_on_memory_threads_or_tiles(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: dict[str, Any], method: str
) -> None:
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(budget, "MIN_MEMORY", 1)
    models = [{"model": str(root / name), "parameters": {"weight": 1.0, "density": 0.5}} for name in "bc"]
    value = {"merge_method": method, "base_model": str(root / "a"), "models": models, "tokenizer": tokenizer}
    seen = set()
    for at, (memory, threads, tile) in enumerate([(1 << 30, 1, 1 << 20), (60 << 20, 3, 1), (15 << 20, 1, 3000)]):
        monkeypatch.setattr(tiling, "TILE_NBYTES", tile)
        out = mergeforge.merge(value, out=tmp_path / str(at), device="cpu", memory=memory, threads=threads)
        seen.add((out / "model.safetensors").read_bytes())
    assert len(seen) == 1


def test_config_ids_and_chat_template_follow_the_tokenizer(root: Path, tmp_path: Path) -> None:
    """a's tokenizer has <s> and </s> behind its words, b's the other way round."""
    ids = {"bos_token_id": 290, "eos_token_id": [291, 5], "pad_token_id": None}
    one = write(tmp_path / "one", "english", seed=1, config=ids, chat_template="{{ messages[0].content }}")
    count = len(loaded(one))
    ids |= {"bos_token_id": count - 2, "eos_token_id": [count - 1, 5]}
    for name in ("config.json", "generation_config.json"):
        (one / name).write_text(json.dumps(json.loads((one / name).read_text()) | ids))
    value = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in (one, root / "b")],
    }
    value |= {"tokenizer_source": str(root / "b"), "chat_template": "auto"}
    out = mergeforge.merge(value, out=tmp_path / "out", device="cpu")
    tokenizer = loaded(out)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((out / name).read_text())
        assert found["bos_token_id"] == tokenizer.bos_token_id
        assert found["eos_token_id"][0] == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_tokenizer_of_a_merge_that_uses_an_earlier_result(root: Path, tmp_path: Path) -> None:
    """first: a and c with a union; the result in b's tokens is the mean of first's and b's rows."""

    def linear(*names: str, **more: Any) -> dict[str, Any]:
        return {
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": 1.0}} for name in names],
            **more,
        }

    a, b, c = (str(root / name) for name in "abc")
    out = mergeforge.merge(
        [linear(a, c, name="first", tokenizer_source="union"), linear("first", b, tokenizer_source=b)],
        out=tmp_path / "out",
        device="cpu",
    )
    first = mergeforge.merge(linear(a, c, tokenizer_source="union"), out=tmp_path / "first", device="cpu")
    merged, before = load_file(out / "model.safetensors"), load_file(first / "model.safetensors")
    theirs, own = loaded(first).get_vocab(), load_file(root / "b" / "model.safetensors")
    for token, number in loaded(out).get_vocab().items():
        row = before[EMBEDDING][theirs[token]] if token in theirs else own[EMBEDDING][number]
        torch.testing.assert_close(merged[EMBEDDING][number], (row + own[EMBEDDING][number]) / 2)


def test_gguf_contains_the_new_tokens(root: Path, tmp_path: Path) -> None:
    import gguf

    value = recipe(root, CASES["padded"]) | {"output": {"gguf": ["f32"], "safetensors": False}}
    out = mergeforge.merge(value, out=tmp_path / "out", device="cpu")
    reader = gguf.GGUFReader(next(out.glob("*.gguf")))
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == GOLDEN["padded"]["rows"]


def test_without_a_tokenizer_setting_shapes_must_be_equal(root: Path, tmp_path: Path) -> None:
    value = recipe(root, CASES["union"])
    del value["tokenizer"]
    with pytest.raises(SourceError, match=r"lm_head.weight is \[302, 16\], not \[292, 16\]") as caught:
        mergeforge.plan(value, out=tmp_path / "out", device="cpu")
    assert "tokenizer_source" in caught.value.hint


def test_adapter_must_not_change_rows_that_move(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rows = len(load_file(root / "a" / "model.safetensors")[EMBEDDING])
    save_file(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, rows),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(16, 2),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    value = recipe(root, CASES["union, base not listed"]) | {
        "merge_method": "task_arithmetic",
        "adapters": [str(tmp_path)],
    }
    value["parameters"] = {"weight": 1.0}
    with pytest.raises(
        RecipeError, match=r"changes model.embed_tokens.weight, whose rows the output's tokenizer moves"
    ):
        mergeforge.plan(value, out=tmp_path / "out", device="cpu")
