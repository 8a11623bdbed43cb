"""hf_ties.json against the classes of the installed transformers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from typing import Any

import pytest
from support.paths import PACKAGE, ROOT
from support.quiet import quiet

FILE = PACKAGE / "checkpoints" / "hf_ties.json"
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
    """For each class: the entry in the file, and the one that tools/hf_ties makes now."""
    import transformers

    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if stored["transformers"] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {stored['transformers']}")
    with quiet():
        made = _tool().table(names)
    wanted = names or [*stored["of"], *made["of"]]
    assert {name: _entry(stored, name) for name in wanted} == {name: _entry(made, name) for name in wanted}


def _entry(table: dict[str, Any], name: str) -> Any:
    return table["entries"][table["of"][name]]


def _tool() -> Any:
    path = str(ROOT / "tools" / "hf_ties")
    loader = importlib.machinery.SourceFileLoader("hf_ties", path)
    spec = importlib.util.spec_from_loader("hf_ties", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
