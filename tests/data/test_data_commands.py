"""mergeforge data: preview, stats, split and build on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.byte_chats import REASONING, chat, chatml, ids, write_rows

from mergeforge.cli import run_command

ROWS = [{"prompt": f"question {at}", "response": f"answer {at}", "id": at} for at in range(10)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return "rows.jsonl"


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_command(["data", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_preview_shows_the_decision_and_marks_trained_text(
    data: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output_of(capsys, "preview", data, "--model", str(folder), "--rows", "2")
    assert "format      prompt_response: 'prompt' is the question, 'response' the answer" in text
    assert "columns     prompt = prompt, response = response" in text
    assert "not used    id" in text
    assert "template    plain: the tokenizer has no chat template" in text
    assert "rows.jsonl:2: " in text
    assert "User: question 1\nAssistant:⟦ answer 1</s>⟧" in text


def test_preview_in_color(data: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = output_of(capsys, "preview", data, "--model", str(folder))
    assert "\x1b[1;32m answer 0</s>\x1b[0m" in text
    assert "⟦" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦ answer 0</s>⟧" in output_of(capsys, "preview", data, "--model", str(folder))


def test_preview_without_a_model_shows_the_row(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "preview", data)
    assert "user: question 0\nassistant: answer 0" in text
    assert "add --model" in text


def test_preview_lists_tokens(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "preview", data, "--model", str(folder), "--tokens")
    assert "257  trained  '</s>'" in text
    assert len([line for line in text.splitlines() if line.endswith("'")]) > len(ids("question 0 answer 0"))


def test_preview_as_json(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(output_of(capsys, "preview", data, "--model", str(folder), "--json"))
    (row,) = facts["rows"]
    (example,) = row["examples"]
    assert row["place"] == "rows.jsonl:1"
    assert example["tokens"] == [*ids("User: question 0\nAssistant: answer 0"), 257]
    assert [label for label in example["labels"] if label != -100] == [*ids(" answer 0"), 257]


def test_preview_shows_skipped_rows(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("bad.jsonl"), ["{", ROWS[0]])
    assert "bad.jsonl:1: not used: not JSON" in output_of(capsys, "preview", "bad.jsonl")


def test_columns_and_format_are_options(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "preview", data, "--columns", "prompt=id", "--columns", "response=prompt")
    assert "user: 0\nassistant: question 0" in text
    text = output_of(capsys, "preview", data, "--format", "text", "--columns", "text=response")
    assert "\nanswer 0\n" in text
    assert "did you mean 'prompt'?" in output_of(capsys, "preview", data, "--columns", "promt=id", code=2)
    assert "write ROLE=COLUMN" in output_of(capsys, "preview", data, "--columns", "prompt", code=2)
    assert "'format' cannot be 'alpca'" in output_of(capsys, "preview", data, "--format", "alpca", code=2)


def test_data_of_a_train_yaml(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.yaml").write_text(f"model: {folder}\ndata: rows.jsonl\nloss_on: all\nseq_len: auto\nlr: 1e-4\n")
    facts = json.loads(output_of(capsys, "preview", "train.yaml", "--json"))
    labels = facts["rows"][0]["examples"][0]["labels"]
    assert -100 not in labels[1:], "loss_on: all"
    assert "did you mean 'alpaca'" in _with_format(capsys)


def _with_format(capsys: pytest.CaptureFixture[str]) -> str:
    Path("wrong.yaml").write_text("data: [{path: rows.jsonl, format: alpca}]\n")
    return output_of(capsys, "preview", "wrong.yaml", code=2)


def test_stats_in_tokens_and_characters(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    length = len(ids("User: question 0\nAssistant: answer 0")) + 1
    text = output_of(capsys, "stats", data, "--model", str(folder))
    assert "10 rows: 10 used, 0 empty, 0 too long, 0 bad" in text
    assert f"{10 * length:,} tokens in 10 examples" in text
    assert "█" in text
    facts = json.loads(output_of(capsys, "stats", data, "--model", str(folder), "--json"))
    assert (facts["unit"], facts["tokens"], facts["p50"]) == ("tokens", 10 * length, length)
    assert facts["trained"] == 10 * (len(ids(" answer 0")) + 1)
    facts = json.loads(output_of(capsys, "stats", data, "--json"))
    assert (facts["unit"], facts["p50"]) == ("characters", len("question 0answer 0"))


def test_stats_report_skipped_rows(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*({"prompt": "q", "response": ""} for _ in range(20)), {"prompt": "q", "response": "a"}]
    write_rows(Path("empty.jsonl"), rows)
    text = output_of(capsys, "stats", "empty.jsonl", "--model", str(folder))
    assert "21 rows: 1 used, 20 empty" in text
    assert "empty.jsonl:1: not used: an empty answer (and 19 more)" in text
    assert "only 0 of 10 rows" in output_of(capsys, "stats", data, "--model", str(folder), "--seq-len", "5", code=3)


def test_split_writes_whole_rows_once(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(output_of(capsys, "split", data, "--val", "0.2", "--out", "out", "--json"))
    assert facts["written"] == {"train": 8, "validation": 2}
    sides = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in facts["files"].values()]
    assert sorted((row for side in sides for row in side), key=lambda row: row["id"]) == ROWS
    assert [row["id"] for row in sides[0]] == sorted(row["id"] for row in sides[0]), "in the order of the file"
    assert "already exist" in output_of(capsys, "split", data, "--out", "out", code=5)
    again = json.loads(output_of(capsys, "split", data, "--val", "2", "--out", "out", "--overwrite", "--json"))
    assert again["written"] == facts["written"]
    assert "val" in output_of(capsys, "split", data, "--val", "1.5", "--out", "new", code=2)


def test_split_keeps_other_columns_that_are_not_utf_8(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({**row, "id": f"x{row['id']}"}).encode().replace(b'"x', b'"\xff') for row in ROWS]
    Path("odd.jsonl").write_bytes(b"\n".join(rows))
    output_of(capsys, "split", "odd.jsonl", "--out", "out")
    assert "\\udcff" in Path("out/train.jsonl").read_text()


def test_equal_rows_stay_on_one_side(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    copies = [{**row, "id": at} for at, row in enumerate(ROWS * 3)]
    write_rows(Path("copies.jsonl"), copies)
    facts = json.loads(output_of(capsys, "split", "copies.jsonl", "--out", "out", "--json"))
    assert facts["written"] == {"train": 27, "validation": 3}


def test_build_counts_what_it_wrote(data: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structure = "categories: {a: {content_types: qa, subcategories: {b: {}}}}\n"
    Path("structure.yaml").write_text(structure)
    assert "created without entries: a.b.qa.json" in output_of(
        capsys, "build", "structure.yaml", "--out", "t.jsonl", "--scaffold"
    )
    entry = {"question": "q", "output": "a", "difficulty": "hard"}
    Path("topics/a.b.qa.json").write_text(json.dumps([entry, entry]))
    text = output_of(capsys, "build", "structure.yaml", "--out", "t.jsonl", "--tokenizer", str(folder))
    assert "t.jsonl: 2 rows from 1 topic files" in text
    assert "by difficulty: 4 2" in text
    length = len(ids("User: q\nAssistant: a")) + 1
    assert f"tokens per example: {length} (p50)" in text
    facts = json.loads(output_of(capsys, "build", "structure.yaml", "--out", "t.jsonl", "--json", "--no-stats"))
    assert (facts["rows"], facts.get("counts")) == (2, None)
    assert "user: q\nassistant: a" in output_of(capsys, "preview", "t.jsonl")


def test_without_transformers(data: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "transformers>=5.0"' in output_of(capsys, "preview", data, "--model", "x", code=6)


def test_model_without_a_tokenizer(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "has no tokenizer that transformers can read" in output_of(
        capsys, "preview", data, "--model", "empty", code=3
    )


def test_preview_shows_every_example_of_a_row(
    data: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chatml(folder, REASONING).save_pretrained(tmp_path / "reasoning")
    write_rows(Path("r.jsonl"), [{"messages": chat("q", "<think>x</think>a", "r", "b")}])
    text = output_of(capsys, "preview", "r.jsonl", "--model", str(tmp_path / "reasoning"))
    assert "example 1 of 2 (found by prefix, one example per answer)" in text
    assert "<|im_start|>assistant\n⟦<think>x</think>a<|im_end|>⟧" in text
    assert "<|im_start|>assistant\na<|im_end|>\n" in text, "the second example has no reasoning"
