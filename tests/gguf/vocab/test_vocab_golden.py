"""Special tokens and chat templates equal those that llama.cpp's converter (b11549) wrote, where it is not installed.

    MERGEFORGE_LLAMA_CPP=... PYTHONPATH=tests:tests/gguf python tests/gguf/vocab/test_vocab_golden.py

rewrites golden_special_tokens.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.gguf_keys import Key, as_read, with_prefix
from support.llama_cpp_tools import convert, needs_converter, read
from support.special_token_cases import BASE, random_case
from support.tokenizer_folders import tokenizer_files, write_model

from mergeforge.gguf.vocab import vocabulary

GOLDEN = Path(__file__).with_name("golden_special_tokens.json")
SEEDS = range(400, 480)


def abridged(keys: dict[str, Key]) -> dict[str, Any]:
    """All keys except the trained vocabulary, of which only the types of the added tokens remain."""
    kept = {key: [list(types), value] for key, (types, value) in keys.items()}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        del kept[key]
    if names := kept.get("tokenizer.chat_templates"):
        names[1] = sorted(names[1])  # the converter writes a set
    kept["tokenizer.ggml.token_type"][1] = kept["tokenizer.ggml.token_type"][1][BASE:]
    return kept


def converter_keys(root: Path) -> dict[str, Any]:
    cases = {seed: random_case(seed) for seed in SEEDS}
    jobs = [
        (write_model(root / str(seed), case.settings, case.files), root / f"{seed}.gguf", "f16", "gpt-2")
        for seed, case in cases.items()
    ]
    assert convert(jobs) == {}
    return {str(seed): abridged(with_prefix(read(root / f"{seed}.gguf").keys, "tokenizer.")) for seed in cases}


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_equal_the_golden_ones(seed: int, tmp_path: Path) -> None:
    case = random_case(seed)
    folder = write_model(tmp_path, case.settings, case.files)
    rows = int(case.settings["vocab_size"])
    keys = vocabulary(tokenizer_files(folder), case.settings, case.kind, rows=rows, pre=case.pre).keys
    assert abridged(as_read(keys)) == json.loads(GOLDEN.read_text("utf-8"))[str(seed)]


@needs_converter
@pytest.mark.slow
def test_golden_keys_equal_those_of_the_converter(tmp_path: Path) -> None:
    assert converter_keys(tmp_path) == json.loads(GOLDEN.read_text("utf-8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in converter_keys(Path(root)).items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
