"""Rows with preferences: TRL's formats, and rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeforge.data import DataSettings, DataSource, PreferenceSample, prepare
from mergeforge.data.counts import RecordCounter
from mergeforge.data.source_reader import open_files, parse_file
from mergeforge.errors import SourceError

QUESTION = [{"role": "user", "content": "2 + 2?"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Four.", "Five."))
PAIR = {"prompt": "2 + 2?", "chosen": "Four.", "rejected": "Five."}
EQUIVALENT = {
    "text": PAIR,
    "messages": {"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]},
    "JSON text": {"prompt": json.dumps(QUESTION), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "whole conversations": {"chosen": [*QUESTION, GOOD], "rejected": [*QUESTION, BAD]},
    "whole conversations beside the prompt": {
        "prompt": "2 + 2?",
        "chosen": [*QUESTION, GOOD],
        "rejected": [*QUESTION, BAD],
        "messages": [*QUESTION, GOOD],
    },
}


def parsed(rows: list[dict[str, Any]], format: str) -> tuple[list[Any], RecordCounter]:
    counter, contents = RecordCounter(), []
    for file in open_files(DataSource("rows", format, rows=tuple(rows))):
        contents += [row.content for row in parse_file(file, counter)]
    return contents, counter


def said(sample: PreferenceSample) -> list[tuple[list[tuple[str, str]], bool]]:
    """(role, content) of all messages of each answer, and whether it is preferred."""
    return [
        ([(message["role"], message["content"]) for message in answer.conversation.messages], answer.preferred)
        for answer in sample.answers
    ]


@pytest.mark.parametrize("row", EQUIVALENT.values(), ids=EQUIVALENT.keys())
def test_all_formats_of_pairs_say_the_same(row: dict[str, Any]) -> None:
    (sample,), _ = parsed([row], "preference")
    assert said(sample) == [
        ([("user", "2 + 2?"), ("assistant", "Four.")], True),
        ([("user", "2 + 2?"), ("assistant", "Five.")], False),
    ]


def test_texts_without_a_prompt_share_their_start() -> None:
    (sample,), _ = parsed([{"chosen": "The sky is blue.", "rejected": "The sky is black."}], "preference")
    assert [answer[0] for answer in said(sample)] == [
        [("user", "The sky is "), ("assistant", "blue.")],
        [("user", "The sky is "), ("assistant", "black.")],
    ]


@pytest.mark.parametrize("label", [False, "false", "False"])
def test_labeled_answers(label: Any) -> None:
    rows = [{"prompt": "2 + 2?", "completion": "Five.", "label": label}]
    (sample,), _ = parsed(rows, "unpaired_preference")
    assert said(sample) == [([("user", "2 + 2?"), ("assistant", "Five.")], False)]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("preference", PAIR | {"rejected": "Four."}, "are equal"),
    ("preference", PAIR | {"rejected": None}, "no rejected answer"),
    ("preference", {"prompt": "2 + 2?", "chosen": "Four."}, "no column 'rejected'"),
    ("preference", PAIR | {"chosen": 4.5, "rejected": ["x"]}, "'rejected' must be text"),
    ("preference", PAIR | {"prompt": ""}, "no prompt"),
    ("preference", {"chosen": "Yes.", "rejected": "No."}, "no common start"),
    ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
    ("preference", {"chosen": [*QUESTION, GOOD], "rejected": [QUESTION[0] | {"content": "?"}, BAD]}, "same prompt"),
    ("preference", PAIR | {"rejected": [*QUESTION]}, "last message is not the assistant's"),
    ("unpaired_preference", {"prompt": "a", "completion": "b", "label": 1}, "label must be true"),
    ("unpaired_preference", {"prompt": "a", "completion": "b", "label": "good"}, "label must be true"),
    ("unpaired_preference", {"prompt": "a", "completion": "b", "label": None}, "label must be true"),
    ("unpaired_preference", {"prompt": "a", "completion": "", "label": True}, "an empty answer"),
]


@pytest.mark.parametrize(("format", "row", "why"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_row_that_cannot_be_used_is_skipped_with_its_place(format: str, row: dict[str, Any], why: str) -> None:
    usable = PAIR if format == "preference" else {"prompt": "a", "completion": "b", "label": True}
    contents, counter = parsed([usable, row], format)
    assert len(contents) == 1
    (skipped,) = counter.skipped
    assert why in skipped.why and skipped.place == "rows[1]"


def test_a_file_of_unusable_rows_is_an_error_with_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR | {"rejected": "Four."}) + "\n")
    settings = DataSettings((DataSource(str(path), "preference"),), template="chatml")
    with pytest.raises(SourceError, match=r"rows.jsonl:1: the chosen and the rejected answer are equal"):
        prepare(settings, tokenizer, tmp_path / "data")


def test_a_pair_is_stored_as_two_examples_that_share_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    settings = DataSettings((DataSource("rows", "preference", rows=(PAIR,)),), template="chatml")
    store = prepare(settings, tokenizer, tmp_path).train
    chosen, rejected = store[0], store[1]
    assert (chosen.preference, rejected.preference) == (1, -1) and len(store) == 2
    texts = [tokenizer.decode(row.tokens[row.labels != -100].tolist()) for row in (chosen, rejected)]
    assert "Four." in texts[0] and "Five." in texts[1] and "2 + 2?" not in "".join(texts)


def test_a_pair_with_one_answer_that_is_too_long_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    long = PAIR | {"rejected": "Five. " * 50}
    settings = DataSettings((DataSource("rows", "preference", rows=(PAIR, long)),), template="chatml", seq_len=90)
    prepared = prepare(settings, tokenizer, tmp_path)
    assert len(prepared.train) == 2 and prepared.counts.too_long == 1


def test_pairs_are_not_split_between_training_and_validation(tmp_path: Path, tokenizer: Any) -> None:
    rows = tuple(PAIR | {"prompt": f"{number} + 1?"} for number in range(20))
    settings = DataSettings((DataSource("rows", "preference", rows=rows),), template="chatml", validation=5)
    prepared = prepare(settings, tokenizer, tmp_path)
    assert prepared.validation is not None
    for store, pairs in ((prepared.train, 15), (prepared.validation, 5)):
        assert [store[index].preference for index in range(len(store))] == [1, -1] * pairs


@pytest.mark.parametrize("row", [PAIR, {"prompt": "a", "completion": "b", "label": True}])
def test_preferences_are_not_read_as_answers_to_imitate(row: dict[str, Any]) -> None:
    with pytest.raises(SourceError) as caught:
        parsed([row], "auto")
    assert "objective: " in str(caught.value.hint)


def test_columns_can_be_named() -> None:
    source = DataSource(
        "rows",
        "preference",
        {"prompt": "q", "chosen": "better", "rejected": "worse"},
        rows=({"q": "2 + 2?", "better": "Four.", "worse": "Five."},),
    )
    (file,) = open_files(source)
    (row,) = parse_file(file, RecordCounter())
    assert isinstance(row.content, PreferenceSample) and len(row.content.answers) == 2
