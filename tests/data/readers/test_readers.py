"""Records of every kind of file, and what cannot be read: reported with file and line, never dropped silently."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.byte_chats import write_rows

from mergeforge.data.readers.base import Record, UnreadableRecord
from mergeforge.data.readers.open import read_records, source_files
from mergeforge.data.settings import DataSource
from mergeforge.errors import MergeforgeError, MissingExtraError, RecipeError, SourceError

ROWS = [{"prompt": f"question {at}", "response": f'says "{at}",\nthen ünïcode 日本'} for at in range(5)]


def read(path: Any) -> list[Record | UnreadableRecord]:
    source = DataSource(str(path))
    return [row for file in source_files(source) for row in read_records(source, file)]


def values(path: Any) -> list[Any]:
    return [row.value for row in read(path) if isinstance(row, Record)]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_csv(path: Path, separator: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "a.jsonl.gz", gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write(tmp_path / "list.json", json.dumps(ROWS))
    write(tmp_path / "indented.json", json.dumps(ROWS, indent=2, ensure_ascii=False))
    write(tmp_path / "object.json", json.dumps({"version": "1", "data": ROWS, "license": None}, indent=1))
    write(tmp_path / "lines.json", (tmp_path / "a.jsonl").read_bytes())
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "semicolons.csv", ";")
    write_csv(tmp_path / "a.tsv", "\t")
    write_parquet(tmp_path / "a.parquet", ROWS)
    rows_by_file = {path.name: values(path) for path in tmp_path.iterdir()}
    assert rows_by_file == dict.fromkeys(rows_by_file, ROWS)
    assert len(rows_by_file) == 10


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    jsonl = write_rows(tmp_path / "a.jsonl", [ROWS[0], "", ROWS[1]])
    assert [row.place for row in read(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]
    write_csv(tmp_path / "a.csv")
    assert [row.place.rpartition(":")[2] for row in read(tmp_path / "a.csv")] == ["2", "4", "6", "8", "10"]
    indented = write(tmp_path / "a.json", json.dumps(ROWS[:2], indent=1))
    assert [row.place.rpartition(":")[2] for row in read(indented)] == ["2", "6"]
    write_parquet(tmp_path / "a.parquet", ROWS)
    assert read(tmp_path / "a.parquet")[1].place == f"{tmp_path / 'a.parquet'} row 2"


def test_json_values_larger_than_the_read_buffer(tmp_path: Path) -> None:
    rows = [{"text": "x" * (length := 3**power), "n": length} for power in range(13)] * 2
    for name, written in (("list", rows), ("object", {"data": rows, "after": [1, 2]})):
        assert values(write(tmp_path / f"{name}.json", json.dumps(written, indent=1))) == rows


def test_single_conversation_in_a_file_is_one_row(tmp_path: Path) -> None:
    row = {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert values(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
    assert values(write(tmp_path / "b.json", json.dumps({"conversations": [row, row]}))) == [row, row]
    assert values(write(tmp_path / "c.json", json.dumps([row["conversations"]]))) == [
        {"messages": row["conversations"]}
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "why"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "c"}\n', 2, "not JSON: Expecting value at column 9"),
        ("a.jsonl", '{"text": "a"}\n17\n{"text": "c"}\n', 2, "a row must be a mapping, not 17"),
        ("a.jsonl", '{"text": "a"}\nnull\n{"text": "c"}\n', 2, "a row must be a mapping, not nothing"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 99999 + '\n{"text": "c"}\n', 2, "not JSON"),
        ("a.csv", "text,id\na,1\nb,2,3\nc,3\n", 3, "3 fields, but the header names 2 columns"),
        ("a.csv", 'text,id\na,1\n"b"x,2\nc,3\n', 3, "not CSV"),
    ],
)
def test_broken_line_is_reported_and_the_others_are_read(
    tmp_path: Path, name: str, content: str, line: int, why: str
) -> None:
    path = write(tmp_path / name, content)
    first, broken, last = read(path)
    assert isinstance(broken, UnreadableRecord)
    assert broken.place == f"{path}:{line}"
    assert broken.why.startswith(why)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert (first.value["text"], last.value["text"]) == ("a", "c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', r"a.json:3: not JSON: Expecting value"),
        ("a.json", '[{"a": 1} {"a": 2}]', "expected ','"),
        ("a.json", '[{"a": 1}', "expected ','"),
        ("a.json", '[{"a": 1}] x', "more text after the end"),
        ("a.json", "", "is empty"),
        ("a.json", "17", "not a JSON list or object"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "more than one list: train, test"),
        ("a.json", '{"prompt": {"0": "a"}, "response": {"0": "b"}}', "holds columns, not rows"),
        ("a.json", '{"prompt": ["a", "b"], "response": ["b", "c"]}', "holds columns, not rows"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        ("a.csv", "", "is empty"),
        ("a.csv", "a,b,a\n1,2,3\n", "duplicate column names: a"),
        ("a.parquet", "PAR1 but no more", "is not a Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.xlsx", "x", r"'.xlsx' files are not supported"),
    ],
)
def test_unreadable_files_are_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path / name, content))


def test_folders_and_globs_in_order(tmp_path: Path) -> None:
    for at, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [ROWS[at]])
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".hidden.jsonl", "x")
    assert values(tmp_path) == [ROWS[1], ROWS[0], ROWS[2]]
    assert [row.place for row in read(tmp_path / "*.jsonl")] == [f"{tmp_path / name}.jsonl:1" for name in "ab"]
    assert values(tmp_path / "**" / "*.jsonl") == values(tmp_path)
    for path, message in ((tmp_path / "x*", "no file matches"), (tmp_path / "no", "there is no data")):
        with pytest.raises(SourceError, match=message):
            read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no data"):
        read(tmp_path / "empty")


def test_long_text_files_are_split_at_blank_lines(tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", "\nOne.\n\nTwo.\n")
    assert values(short) == [{"text": "One.\n\nTwo."}]
    blocks = [f"{at}: " + "word " * 3000 for at in range(12)]
    records = read(write(tmp_path / "book.txt", "\n\n".join(blocks)))
    texts = [row.value["text"] for row in records if isinstance(row, Record)]
    assert "\n\n".join(texts).split("\n\n") == blocks
    assert all(len(text) <= 1 << 16 for text in texts)
    assert [row.place.rpartition(":")[2] for row in records] == ["1", "9", "17"]


def test_python_rows(tmp_path: Path) -> None:
    source = DataSource("mine", rows=(ROWS[0], {"text": "x"}))
    assert [row.place for file in source_files(source) for row in read_records(source, file)] == ["mine[0]", "mine[1]"]


def test_samples_by_name() -> None:
    assert [len(values(f"sample:{name}")) for name in ("chat", "instruct", "code", "summarise", "translate")] == [
        20
    ] * 5
    with pytest.raises(RecipeError, match="there is no sample 'chta'") as error:
        read("sample:chta")
    assert error.value.hint == "did you mean 'chat'?"


def test_hub_id_without_hf_prefix(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        read("owner/name")
    assert error.value.hint == "for a data set on the Hub write hf://owner/name"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError) as error:
        read(write(tmp_path / "a.parquet", "x"))
    assert error.value.hint == 'pip install "pyarrow>=15"'


def test_symlink_loop_is_an_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(MergeforgeError):
        read(loop)


@pytest.mark.parametrize(
    "layout", ["[{a},\n{b},\n{c}]", "[\n{a},\n{b},\n{c}\n]\n", "[{a}, {b}, {c}]", "[\n  {a}, {b},\n  {c}]"]
)
def test_a_json_list_in_a_jsonl_file_is_read_whole(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": f"q{at}", "response": "[1]"} for at in range(3)]
    text = layout.replace("{a}", "%s").replace("{b}", "%s").replace("{c}", "%s") % tuple(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(text)
    assert values(tmp_path / "a.jsonl") == rows


def test_lists_of_messages_on_each_line_stay_rows(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": "a"}] for at in range(2)]
    for count in (1, 2):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[:count]))
        assert values(tmp_path / "a.jsonl") == [{"messages": chat} for chat in chats[:count]]
