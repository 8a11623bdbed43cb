"""Special tokens and chat templates as llama.cpp's converter (b11549) wrote them, for machines without it.

    MERGEFORGE_LLAMA_CPP=... PYTHONPATH=tests:tests/gguf python tests/gguf/vocab/test_vocab_golden.py

writes golden_special_tokens.json anew.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.gguf_keys import Key, as_read, some
from support.llama_cpp_tools import convert, needs_converter, read
from support.special_token_cases import BASE, any_case
from support.tokenizer_folders import tokenizer_files, write_model

from mergeforge.gguf.vocab import vocabulary

GOLDEN = Path(__file__).with_name("golden_special_tokens.json")
SEEDS = range(400, 480)


def short(keys: dict[str, Key]) -> dict[str, Any]:
    """All but the trained vocabulary: of that the types of the added tokens."""
    found = {key: [list(kinds), value] for key, (kinds, value) in keys.items()}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        del found[key]
    if names := found.get("tokenizer.chat_templates"):
        names[1] = sorted(names[1])  # theirs is a set
    found["tokenizer.ggml.token_type"][1] = found["tokenizer.ggml.token_type"][1][BASE:]
    return found


def converted(root: Path) -> dict[str, Any]:
    cases = {seed: any_case(seed) for seed in SEEDS}
    jobs = [
        (write_model(root / str(seed), case.settings, case.files), root / f"{seed}.gguf", "f16", "gpt-2")
        for seed, case in cases.items()
    ]
    assert convert(jobs) == {}
    return {str(seed): short(some(read(root / f"{seed}.gguf").keys, "tokenizer.")) for seed in cases}


@pytest.mark.parametrize("seed", SEEDS)
def test_ours(seed: int, tmp_path: Path) -> None:
    case = any_case(seed)
    folder = write_model(tmp_path, case.settings, case.files)
    rows = int(case.settings["vocab_size"])
    keys = vocabulary(tokenizer_files(folder), case.settings, case.kind, rows=rows, pre=case.pre).keys
    assert short(as_read(keys)) == json.loads(GOLDEN.read_text("utf-8"))[str(seed)]


@needs_converter
@pytest.mark.slow
def test_the_converters(tmp_path: Path) -> None:
    assert converted(tmp_path) == json.loads(GOLDEN.read_text("utf-8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in converted(Path(root)).items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
