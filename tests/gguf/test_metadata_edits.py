"""KEY=VALUE texts as typed values of GGUF keys."""

from __future__ import annotations

import pytest

from mergeforge.errors import RecipeError
from mergeforge.gguf.key_values import Value
from mergeforge.gguf.metadata_edits import read_edits

KEYS = {"tags": Value("array", ("a", "b"), "string"), "eps": Value("f32", 1e-5), "name": Value("string", "x")}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('tags=["c"]', Value("array", ("c",), "string")),
        ("eps=1", Value("f32", 1.0)),
        ("name=true", Value("string", "true")),
        ("new=-3", Value("i32", -3)),
        ("new=NaN", Value("string", "NaN")),
        ("new=f64:0.5", Value("f64", 0.5)),
    ],
)
def test_values_have_the_type_of_the_key_or_of_their_json(text: str, value: Value) -> None:
    assert read_edits([text], KEYS) == {text.partition("=")[0]: value}


@pytest.mark.parametrize(
    "text",
    [
        "eps=NaN",
        "eps=1e999",
        "eps=f32:1",
        'tags=["\\ud800"]',
        "tags=[1]",
        "name=\udcff",
        "\udcff=1",
        "new=f32:-Infinity",
    ],
)
def test_values_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--set-metadata"):
        read_edits([text], KEYS)
