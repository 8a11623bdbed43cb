"""Which tokenizer is used for the rows of a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mergeforge import eval
from mergeforge.errors import SourceError

pytest.importorskip("xllamacpp")


@pytest.fixture
def lone(merged: Path, tmp_path: Path) -> Path:
    (tmp_path / "deep" / "lone").mkdir(parents=True)
    return Path(shutil.copy(merged / "m-F32.gguf", tmp_path / "deep" / "lone" / "x.gguf"))


def test_tokenizer_made_from_the_file(lone: Path, merged: Path, questions: Path) -> None:
    evaluation = eval.evaluate(lone, questions, limit=5)
    assert evaluation.nll == pytest.approx(eval.evaluate(merged, questions, limit=5).nll, abs=2e-4)


def test_tokenizer_of_the_model_named_by_the_receipt(lone: Path, merged: Path) -> None:
    (lone.parent / "mergeforge.json").write_text(json.dumps({"inputs": [{"name": str(merged)}]}))
    assert eval.open_model(lone).tokenizer.name_or_path == str(merged)


def test_refuses_a_tokenizer_with_another_vocabulary(lone: Path, merged: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(merged, other, ignore=shutil.ignore_patterns("*.gguf"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    rotated = dict(zip(vocabulary, [*list(vocabulary.values())[7:256], *list(vocabulary.values())[:7]], strict=False))
    tokenizer["model"]["vocab"] = vocabulary | rotated
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(SourceError, match="another vocabulary"):
        _ = eval.open_model(lone, tokenizer=str(other)).tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, lone.parent / name)
    assert eval.open_model(lone).tokenizer.encode("a") == [97], (
        "a tokenizer beside the file that does not fit is ignored"
    )


def test_template_instead_of_the_files_own(taught: Path, taught_gguf: Path) -> None:
    messages = [{"role": "user", "content": "the hen"}]
    greedy = eval.Sampling(6, 0)
    expected = eval.open_model(taught, template="raw").chat(messages, greedy).text
    assert eval.open_model(taught_gguf, template="raw").chat(messages, greedy).text == expected
