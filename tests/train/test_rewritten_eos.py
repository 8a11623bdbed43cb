"""A run that ends its answers with another token than the base: the GGUF file against the merged folder's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from support.training_runs import run
from transformers import AutoTokenizer, GenerationConfig

from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import run_post_training

MARKS = ["<|im_start|>", "<|im_end|>"]
ADDED: dict[str, Any] = {"tokens": {"add": MARKS}}
FULL = {"method": "full", "lora": None, "after": {"gguf": ["f16"]}}


def with_marks(base: Path, folder: Path, *, special_map: bool) -> str:
    """A copy of the base whose tokenizer has the marks, with an EOS in special_tokens_map.json as older ones have."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    if special_map:
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return str(folder)


@pytest.mark.parametrize("case", ["added", "present", "present, with a map", "full"])
def test_the_gguf_has_the_eos_and_template_of_the_merged_folder(
    case: str, settings: dict[str, Any], base: Path, here: Path
) -> None:
    """As transformers loads both; generation stops at the new EOS, too."""
    settings |= {"template": "chatml", "max_steps": 1, "after": {"merge": True, "gguf": ["f16"]}}
    settings |= {"added": ADDED, "full": FULL}.get(case, {})
    if case != "added":
        settings["model"] = with_marks(base, here / "base", special_map="map" in case)
    settings = {name: value for name, value in settings.items() if value is not None}
    trained, plan = run(settings), make_plan(settings, device="cpu")
    result = run_post_training(plan, plan.settings.after)
    folder, (path,) = result.merged or trained.result, result.ggufs
    tokenizer, fields = AutoTokenizer.from_pretrained(folder), GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.eos_token == "<|im_end|>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert tokens[tokenizer.eos_token_id] == "<|im_end|>" and tokens[: len(tokenizer)] == [
        tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))
    ]
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_token_id
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id, 257]
