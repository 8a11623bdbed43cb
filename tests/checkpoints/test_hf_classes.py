"""hf_classes.json against the classes of the installed transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import PACKAGE
from support.quiet import quiet
from support.tools import load_tool

FILE = PACKAGE / "checkpoints" / "hf_classes.json"
QUICK = [
    "BertForMaskedLM",
    "BertModel",
    "BartForConditionalGeneration",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
]
QUICK += ["WhisperForConditionalGeneration", "Florence2ForConditionalGeneration", "LlamaForSequenceClassification"]


@pytest.mark.parametrize("names", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_table_is_what_the_tool_makes(names: list[str] | None) -> None:
    """For each class: the entry in the file, and the one that tools/hf_classes makes now."""
    import transformers

    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if stored["transformers"] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {stored['transformers']}")
    with quiet():
        made = load_tool("hf_classes").table(names)
    wanted = names or [*stored["of"], *made["of"]]
    assert {name: _entry(stored, name) for name in wanted} == {name: _entry(made, name) for name in wanted}


def _entry(table: dict[str, Any], name: str) -> Any:
    return table["entries"][table["of"][name]]
