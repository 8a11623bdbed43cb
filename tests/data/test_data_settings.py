"""The data keys of train.yaml: what is read, and what is refused with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from mergeforge.data import FIELDS, DataSettings, DataSource, settings_of
from mergeforge.errors import Problem
from mergeforge.recipe.schema import Record


def read(value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    problems: list[Problem] = []
    found = Record(FIELDS).read(value, (), lambda path, text, hint: problems.append(Problem(0, 0, text, hint)))
    return found, [str(one) for one in problems]


def test_every_key_reaches_the_settings() -> None:
    value = {
        "data": ["a.jsonl", {"path": "hf://o/n", "format": "alpaca", "columns": {"prompt": "q"}}],
        "val": 0.05,
        "template": "chatml",
        "system": "S",
        "loss_on": "last",
        "too_long": "cut_end",
    }
    found, problems = read(value)
    assert not problems and found.keys() == FIELDS.keys()
    sources = (DataSource("a.jsonl"), DataSource("hf://o/n", "alpaca", {"prompt": "q"}))
    want = DataSettings(sources, 0.05, "chatml", "S", "last", 512, "cut_end", 3)
    assert settings_of(found, seq_len=512, seed=3) == want


def test_one_source_needs_no_list() -> None:
    for value in ("a.jsonl", {"path": "a.jsonl"}, ["a.jsonl"]):
        assert settings_of(read({"data": value})[0]).sources == (DataSource("a.jsonl"),)


@pytest.mark.parametrize(
    ("value", "want"), [(0, None), (200, 200), (0.1, 0.1), ("1e-2", 0.01), ("held.jsonl", "held.jsonl")]
)
def test_what_is_held_out(value: Any, want: Any) -> None:
    assert read({"val": value}) == ({"val": want}, [])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"val": 1.5}, "'val' cannot be 1.5 (a share between 0 and 1, or a whole number of rows)"),
        ({"val": -1}, "'val' cannot be -1"),
        ({"val": True}, "'val' cannot be True"),
        ({"loss_on": "asistant"}, "did you mean 'assistant'?"),
        ({"too_long": "cut"}, "'too_long' cannot be 'cut'"),
        ({"data": [{"pth": "x"}]}, "unknown key 'pth' (did you mean 'path'?)"),
        ({"data": []}, "'data' must be a list"),
    ],
)
def test_mistakes_are_told(value: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in read(value)[1])


def test_the_schema_is_one() -> None:
    held = FIELDS["val"].json()
    assert [one["type"] for one in held["anyOf"]] == ["number", "integer", "string"]
