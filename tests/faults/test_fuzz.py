"""Every reader of files from strangers, given files made wrong: an error of ours or success, and never anything else.

A small share of what tools/fuzz does; what crashed once is tried again each time.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faults.fuzzing import Target, targets

NAMES = ["header", "index", "config", "tokenizer", "tokenizer_config", "generation_config", "union", "adapter", "gguf"]
NAMES += ["requantize", "gguf_alone", "gguf_lora", "recipe", "train", "jsonl", "json", "csv", "receipt"]
DEEP = b"[" * 100_000
# Inputs that were crashes once, made from a good one by a replacement.
CRASHED = [
    ("config", b'"num_hidden_layers": 1', b'"num_hidden_layers": 9999999999'),
    ("config", b'"LlamaForCausalLM"', b"5"),
    ("config", b'[\n    "LlamaForCausalLM"\n  ]', b"5"),
    ("config", b'"vocab_size": 320', b'"vocab_size": 18446744073709551616'),
    ("tokenizer", b'"e": 101', b'"e": "68"'),
    ("tokenizer", b'"e": 101', b'"e": 1e400'),
    ("tokenizer", b'"merges": [', b'"merges": [5, '),
    ("tokenizer", b'"merges": [', b'"merges": [[[], {}], '),
    ("union", b'"e": 101', b'"e": 1e400'),
    ("union", b'"e": 101', b'"e": 9223372036854775807'),
    ("tokenizer_config", b'"<s>"', b'"\\ud800"'),
    ("adapter", b'"lora_alpha": 32', b'"lora_alpha": 1' + b"0" * 400),
    ("requantize", b"blk.0.attn_q", b"blk.0.attn\xae_"),
    ("train", b"epochs: 2", b"epochs: 1" + b"0" * 400),
    ("train", b"every: 10", b"every: .inf"),
    ("train", b"every: 10", b"every: .nan"),
    ("recipe", b"5GB", b"9" * 400),
    ("csv", b"prompt,response", b'"prompt",resp"onse"x'),
    ("csv", b"prompt,response", b'"prompt'),
    ("receipt", b'"size"', b'"sizes"'),
    ("receipt", b'"files": {', b'"files": {"x": 5, '),
    ("receipt", b'"tensors": {', b'"tensors": {"x": "y", '),
]


@pytest.fixture(scope="module")
def every(disk: Path) -> dict[str, Target]:
    (disk / "fuzzed").mkdir()
    return {target.name: target for target in targets(disk / "fuzzed")}


def test_every_reader_is_fuzzed(every: dict[str, Target]) -> None:
    assert list(every) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_read(every: dict[str, Target], name: str) -> None:
    target = every[name]
    for seed in target.seeds:
        target.file.unlink(missing_ok=True)
        target.file.write_bytes(seed)
        target.read()


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(every: dict[str, Target], name: str) -> None:
    target = every[name]

    @settings(max_examples=80, deadline=None, database=None, derandomize=True)  # tools/fuzz tries others each time
    @given(st.integers(0, 1 << 32))
    def tried(seed: int) -> None:
        target.try_one(target.mutated(Random(seed)))

    tried()


@pytest.mark.parametrize("name", NAMES)
def test_empty_files_and_endless_nesting(every: dict[str, Target], name: str) -> None:
    for data in (b"", b"\0", b"{}", b"[]", b"null", b"5", b"\xff\xfe", DEEP, b'{"a":' * 50_000):
        every[name].try_one(data)


@pytest.mark.parametrize(("name", "old", "new"), CRASHED, ids=lambda value: str(value)[:30])
def test_files_that_once_caused_a_crash(every: dict[str, Target], name: str, old: bytes, new: bytes) -> None:
    target = every[name]
    seed = next(one for one in target.seeds if old in one)
    target.try_one(seed.replace(old, new, 1))
