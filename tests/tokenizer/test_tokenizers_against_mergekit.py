"""The same tokenizer settings through mergekit 0.1.5 and through mergeforge: every token's row, and what texts become.

The merge is linear with weights of 1, so the result is the sum (not normalized) of the models' embeddings for the
output's tokenizer. Ids are compared by their tokens: mergekit numbers a union's new ones anew in each process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.peers import peer_program
from support.tiny_llamas import EMBEDDING, HEAD, TEXTS, loaded, maps, planned, write_all, written

from mergeforge.tokenizer import ModelToken, TokenizerPlan, TokenSetting, Zero

pytestmark = pytest.mark.peers

DRIVER = """
import json, logging, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

logging.disable(logging.CRITICAL)
errors = {}
for job in json.load(sys.stdin):
    try:
        with open(job["recipe"]) as file:
            value = MergeConfiguration.model_validate(yaml.safe_load(file))
        run_merge(value, job["out"], MergeOptions(quiet=True, write_model_card=False))
    except Exception as error:
        errors[job["name"]] = f"{type(error).__name__}: {error}"
json.dump(errors, open(sys.argv[1], "w"))
"""


def setting(source: Any, force: bool = False) -> dict[str, Any]:
    return {"source": source, "force": force}


def token(model: str, **which: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": model, **which}


ZERO = {"kind": "zero"}
CASES: dict[str, dict[str, Any]] = {
    "union": {"models": "abc"},
    "union of two": {"models": "ab"},
    "union, base listed": {"models": "abc", "base": "a"},
    "union, base listed last": {"models": "bca", "base": "a"},
    "union, base not listed": {"models": "bc", "base": "a"},
    "base": {"models": "abc", "base": "a", "source": "base"},
    "base without one": {"models": "b", "source": "base"},
    "a model's": {"models": "abc", "base": "a", "source": "c"},
    "a model's, no base": {"models": "abc", "source": "b"},
    "padded": {"models": "abc", "pad_to_multiple_of": 64},
    "padded with a base": {"models": "ab", "base": "a", "source": "base", "pad_to_multiple_of": 7},
    "padded by none": {"models": "ab", "base": "a", "source": "base", "pad_to_multiple_of": 1},
    "zero": {"models": "abc", "tokens": {"<think>": setting(ZERO), "<tool>": setting(ZERO, True)}},
    "zero, forced": {"models": "ab", "base": "a", "tokens": {"</s>": setting(ZERO, True), "the": setting(ZERO, True)}},
    "another token": {
        "models": "abc",
        "base": "a",
        "tokens": {
            "<|im_end|>": setting(token("a", token="</s>")),
            "<think>": setting(token("c", token_id=5), True),
            "</s>": setting(token("b", token="<think>"), True),
        },
    },
    "a model's row": {"models": "abc", "base": "a", "tokens": {"</s>": setting("c", True), "<|im_end|>": setting("b")}},
    "new tokens": {
        "models": "ab",
        "tokens": {"<new>": setting(token("b", token="<think>")), "new two": setting(ZERO), "the": setting("a")},
    },
    "unigram and BPE": {"models": "fa", "base": "f"},
    "BPE and words": {"models": "afg", "base": "a"},
    "words and unigram": {"models": "gf", "base": "g", "tokens": {"dog dog": setting(ZERO)}},
    "Qwen's and Llama's": {"models": "hi", "base": "h"},
    "Llama's and Qwen's": {"models": "ih", "base": "i"},
    "a token without a row": {"models": "da", "base": "d"},
    "a named token without a row": {"models": "ea", "base": "e"},
}


def folders(root: Path, case: Mapping[str, Any]) -> list[Path]:
    """The models, with the base after them where it is not listed, as mergekit orders them."""
    base = case.get("base", "")
    return [root / name for name in case["models"] + (base if base not in case["models"] else "")]


def recipe(root: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return str(root / value) if isinstance(value, str) and value in "abcdefghi" else value

    source = case.get("source", "union")
    tokenizer = {"source": placed(source), "tokens": {t: placed(s) for t, s in case.get("tokens", {}).items()}}
    if "pad_to_multiple_of" in case:
        tokenizer["pad_to_multiple_of"] = case["pad_to_multiple_of"]
    models = [{"model": str(root / name), "parameters": {"weight": 1.0}} for name in case["models"]]
    value = {"merge_method": "linear", "models": models, "tokenizer": tokenizer, "dtype": "float32"}
    value["parameters"] = {"normalize": False, "weight": 1.0}
    return value | ({"base_model": str(root / case["base"])} if "base" in case else {})


def ours(root: Path, case: Mapping[str, Any]) -> TokenizerPlan:
    def read(source: Any) -> Any:
        if isinstance(source, str):
            return source
        rest = {key: value for key, value in source.items() if key != "kind"}
        return Zero() if source["kind"] == "zero" else ModelToken(**rest)

    tokens = {name: TokenSetting(read(one["source"]), one["force"]) for name, one in case.get("tokens", {}).items()}
    more = {"pad_to_multiple_of": case["pad_to_multiple_of"]} if "pad_to_multiple_of" in case else {}
    return planned(folders(root, case), case.get("base"), source=case.get("source", "union"), tokens=tokens, **more)


def run_mergekit(root: Path, python: Path) -> None:
    """mergekit's merges of all cases: in one process, since its imports take seconds."""
    jobs = []
    for name, case in CASES.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe(root, case)))
        jobs.append({"name": name, "recipe": str(root / f"{name}.yaml"), "out": str(root / f"{name} theirs")})
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-c", DRIVER, str(root / "errors.json")]
    done = subprocess.run(command, input=json.dumps(jobs), text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = peer_program()
    root = tmp_path_factory.mktemp("mergekit")
    write_all(root)
    run_mergekit(root, python)
    return root


@pytest.mark.parametrize("name", CASES)
def test_rows_and_texts_match_mergekit(root: Path, name: str) -> None:
    errors = json.loads((root / "errors.json").read_text())
    assert name not in errors, errors[name]
    plan = ours(root, CASES[name])
    mine = loaded(written(plan, root / f"{name} ours"))
    peers = loaded(root / f"{name} theirs")
    assert mine.get_vocab().keys() == peers.get_vocab().keys()
    theirs = load_file(root / f"{name} theirs" / "model.safetensors")
    for tensor in (EMBEDDING, HEAD):
        merged = sum(maps(folders(root, CASES[name]), plan, tensor).values())
        assert isinstance(merged, torch.Tensor)
        assert merged.shape == theirs[tensor].shape
        vocabulary = peers.get_vocab()
        for text, number in mine.get_vocab().items():
            torch.testing.assert_close(merged[number], theirs[tensor][vocabulary[text]], atol=1e-6, rtol=0)
        count = len(vocabulary)
        torch.testing.assert_close(merged[count:], theirs[tensor][count:], atol=1e-6, rtol=0)
    if "base" not in CASES[name] and len(CASES[name].get("source", "union")) > 1:
        return  # mergekit takes any model's tokenizer then: its models are a set
    for text in sorted(
        {*(one for texts in TEXTS.values() for one in texts), "a<think>  b<|im_end|>c<s>", "new two<new> the<tool>ü"}
    ):
        assert mine.tokenize(text) == peers.tokenize(text)
        assert mine.decode(mine(text).input_ids) == peers.decode(peers(text).input_ids)
