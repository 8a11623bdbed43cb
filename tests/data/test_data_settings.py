"""The data keys of train.yaml: what they become, and what is refused with which hint."""

from __future__ import annotations

from typing import Any

import pytest

from mergeforge.data import FIELDS, DataSettings, DataSource, data_settings
from mergeforge.errors import Problem
from mergeforge.recipe.schema import Object


def read(value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    problems: list[Problem] = []
    keys = Object(FIELDS).read(value, (), lambda path, text, hint: problems.append(Problem(0, 0, text, hint)))
    return keys, [str(problem) for problem in problems]


def test_every_key_reaches_the_settings() -> None:
    value = {
        "data": ["a.jsonl", {"path": "hf://o/n", "format": "alpaca", "columns": {"prompt": "q"}}],
        "val": 0.05,
        "template": "chatml",
        "system": {"text": "S", "unsupported": "drop"},
        "loss_on": "last",
        "too_long": "cut_end",
    }
    keys, problems = read(value)
    assert not problems and keys.keys() == FIELDS.keys()
    sources = (DataSource("a.jsonl"), DataSource("hf://o/n", "alpaca", {"prompt": "q"}))
    expected = DataSettings(sources, 0.05, "chatml", "S", "last", 512, "cut_end", 3, "drop")
    assert data_settings(keys, seq_len=512, seed=3) == expected


def test_system_is_a_text_or_a_policy() -> None:
    settings = [data_settings(read({"system": value})[0]) for value in ("S", "refuse", {"unsupported": "drop"})]
    assert [(one.system, one.system_policy) for one in settings] == [("S", "merge"), (None, "refuse"), (None, "drop")]


def test_a_single_source_needs_no_list() -> None:
    for value in ("a.jsonl", {"path": "a.jsonl"}, ["a.jsonl"]):
        assert data_settings(read({"data": value})[0]).sources == (DataSource("a.jsonl"),)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, None), (200, 200), (0.1, 0.1), ("1e-2", 0.01), ("held.jsonl", "held.jsonl")]
)
def test_values_of_val(value: Any, expected: Any) -> None:
    assert read({"val": value}) == ({"val": expected}, [])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"val": 1.5}, "'val' cannot be 1.5 (a fraction between 0 and 1, or a whole number of rows)"),
        ({"val": -1}, "'val' cannot be -1"),
        ({"val": True}, "'val' cannot be True"),
        ({"loss_on": "asistant"}, "did you mean 'assistant'?"),
        ({"too_long": "cut"}, "'too_long' cannot be 'cut'"),
        ({"data": [{"pth": "x"}]}, "unknown key 'pth' (did you mean 'path'?)"),
        ({"data": []}, "'data' is an empty list"),
    ],
)
def test_reports_mistakes(value: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in read(value)[1])


def test_val_in_the_json_schema() -> None:
    schema = FIELDS["val"].json_schema()
    assert [kind["type"] for kind in schema["anyOf"]] == ["number", "integer", "string"]
