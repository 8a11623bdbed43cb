"""general.* keys against llama.cpp's converter: names, model cards, sampling; and against expected values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.gguf_keys import as_read, differences, with_prefix
from support.llama_cpp_tools import convert, needs_converter, read
from support.tokenizer_folders import config, sentencepiece_model, tokenizer_files, write_model

from mergeforge.gguf.general_metadata import ParameterCounts, general_keys, parameter_counts
from mergeforge.gguf.key_values import string

NAMES = (
    "Llama-3.2-1B-Instruct",
    "llama-2-7b-hf",
    "Mixtral-8x7B-Instruct-v0.1",
    "TinyMistral-248M-v2.5-Instruct-orpo",
    "qwen2.5-coder-0.5k-chat",
    "my merge of two",
    "phi-3-mini-4k-instruct",
    "bloom-7b1",
    "gemma-2-2b-it",
    "model",
    "a--b-13K-v1-v2-F16",
)
CARD = """---
license: [apache-2.0, mit]
license_name: llama3
license_link: https://example.org/LICENSE
language:
- en
- no
- de
tags:
- merge
pipeline_tag: text-generation
base_model:
- meta-llama/Llama-3.2-1B
- https://huggingface.co/org/Model-2B-v1.5
datasets: org/some-data
model_name: A Name
model_creator: Someone
\tfoo: 1
---
# Text
"""
PLAIN_CARD = "---\nlicense: mit\nlanguages: fr\nbase_model: a/b-3B\ndatasets:\n- x/y\n- https://e.org/z\n---\n"
OWN_CARD = (
    "---\nname: N\nauthor: A\nversion: v9\norganization: O\ndescription: D\nfinetune: F\nbasename: B\n"
    "size_label: 9B\nurl: U\ndoi: I\nuuid: J\nrepo_url: R\n---\n"
)
SAMPLING = {
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "do_sample": True,
    "mirostat": 2,
    "mirostat_tau": 5.0,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({}, {}) for name in NAMES},
    "card": ({}, {"README.md": CARD.replace("\tfoo: 1\n", "")}),
    "tab": ({}, {"README.md": CARD.replace("\tfoo: 1\n", "model-index:\n-\tname: x\n")}),
    "plain-card-1b": ({}, {"README.md": PLAIN_CARD}),
    "own-card": ({}, {"README.md": OWN_CARD}),
    "no-card": ({}, {"README.md": "# Only text\n"}),
    "sampling": ({}, {"generation_config.json": SAMPLING}),
    "both-penalties": ({}, {"generation_config.json": {"penalty_repeat": 1.0, "repetition_penalty": 2.0}}),
    "broken-sampling": ({}, {"generation_config.json": "{nonsense"}),
    "path": ({"_name_or_path": "meta-llama/Llama-2-7b-hf"}, {}),
    "long-path": ({"_name_or_path": "/home/me/models/Llama-2-7b-hf"}, {}),
}


def written(root: Path, name: str) -> Path:
    settings, files = CASES[name]
    return write_model(root / name, config("LlamaForCausalLM", 420, **settings), {**files, **_tokenizer()})


def _tokenizer() -> dict[str, Any]:
    return {"tokenizer.model": sentencepiece_model()}


@needs_converter
def test_against_the_converter(tmp_path: Path) -> None:
    """Every general.* key with its type and value, for many kinds of names, cards and sampling settings."""
    jobs = [(written(tmp_path, name), tmp_path / f"{name}.gguf", "f32", "") for name in CASES]
    assert convert(jobs) == {}
    wrong = {}
    for folder, file, *_ in jobs:
        theirs = with_prefix(read(file).keys, "general.")
        for key in ("architecture", "type", "file_type", "quantization_version"):
            theirs.pop(f"general.{key}")
        shapes = {"token_embd.weight": (420, 32)}
        settings = config("LlamaForCausalLM", 420, **CASES[folder.name][0])
        ours = general_keys(tokenizer_files(folder), settings, folder.name, parameter_counts(shapes))
        if differing := differences(as_read(ours), theirs):
            wrong[folder.name] = differing
    assert wrong == {}


def test_keys_from_the_folder_name_and_the_parameter_counts() -> None:
    sizes = ParameterCounts(1_235_814_400, 1_235_814_400, 0, 0)
    keys = general_keys({}, {}, "Llama-3.2-1B-Instruct", sizes)
    assert {key.removeprefix("general."): value.value for key, value in keys.items()} == {
        "name": "Llama 3.2 1B Instruct",
        "finetune": "Instruct",
        "basename": "Llama-3.2",
        "size_label": "1B",
    }


def test_name_replaces_the_one_from_the_sources() -> None:
    keys = general_keys({}, {}, "phi-3-mini", ParameterCounts(0, 0, 0, 0), name="Mine")
    assert keys["general.name"] == string("Mine")


@pytest.mark.parametrize(
    ("tensors", "counts", "label"),
    [
        ({"token_embd.weight": (1000, 64), "output_norm.weight": (64,)}, (64064, 64064, 0, 0), "64K"),
        (
            {"a.weight": (1000, 1000), "blk.0.ffn_up_exps.weight": (8, 1000, 1000)},
            (9_000_000, 10**6, 10**6, 8),
            "8x2.0M",
        ),
        ({"blk.0.ffn_up_exps.bias": (4, 10)}, (40, 40, 0, 0), "0.04K"),
    ],
)
def test_parameter_counts(tensors: dict[str, tuple[int, ...]], counts: tuple[int, ...], label: str) -> None:
    parameters = parameter_counts(tensors)
    assert (parameters.total, parameters.shared, parameters.expert, parameters.expert_count) == counts
    assert parameters.label == label


def test_card_that_is_not_valid_yaml_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    keys = general_keys({"README.md": tmp_path / "README.md"}, {}, "x", ParameterCounts(0, 0, 0, 0))
    assert list(keys) == ["general.name"]
