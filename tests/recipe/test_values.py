"""Gradients, filters and layers against hand-computed values; the JSON Schema; recipes survive a round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import RECIPES

from mergeforge.errors import RecipeError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.methods import METHODS
from mergeforge.recipe import OUT_DTYPES, json_schema, read
from mergeforge.recipe.parameter_values import layer_of, layer_positions, scalars, value_at
from mergeforge.train import keys

MLP, ATTENTION = "model.layers.3.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("setting", "name", "position", "value"),
    [
        (0.5, MLP, 0.3, 0.5),
        ([0.0, 1.0], MLP, 0.25, 0.25),
        ([0.0, 1.0], MLP, 0.0, 0.0),
        ([0.0, 1.0], MLP, 1.0, 1.0),
        ([1.0, 0.0, 4.0], MLP, 0.75, 2.0),
        ([1.0, 0.0, 4.0], MLP, 0.5, 0.0),
        ([7.0], MLP, 0.9, 7.0),
        ([{"filter": "mlp", "value": 0.25}, {"value": 0.75}], MLP, 0.0, 0.25),
        ([{"filter": "mlp", "value": 0.25}, {"value": 0.75}], ATTENTION, 0.0, 0.75),
        ([{"value": 0.75}, {"filter": "mlp", "value": 0.25}], MLP, 0.0, 0.75),
        ([{"filter": "*", "value": 2}], MLP, 0.0, 2),
        ([{"filter": "mlp", "value": [0, 2]}, {"value": 9}], MLP, 0.5, 1.0),
        ([{"filter": "mlp", "value": 1}], ATTENTION, 0.0, None),
        ([{"filter": "m.p", "value": 1}], MLP, 0.0, None),
    ],
)
def test_value_at(setting: Any, name: str, position: float, value: Any) -> None:
    assert value_at(setting, name, position) == value


def test_booleans_are_not_interpolated() -> None:
    flags = [True, False, True]
    assert [value_at(flags, MLP, at, kind="bool") for at in (0, 0.49, 0.5, 0.99, 1)] == [True, True, False, False, True]


def test_scalars_of_filters_and_numbers() -> None:
    assert list(scalars([{"filter": "a", "value": [1, 2]}, {"value": True}])) == [1, 2, True]
    assert list(scalars(0.5)) == [0.5]
    assert list(scalars(None)) == []


def test_layer_positions_in_each_stack() -> None:
    assert layer_of(MLP) == ("model.layers", 3)
    assert layer_of("transformer.h.11.attn.weight") == ("transformer.h", 11)
    assert layer_of("model.layers.3.experts.7.w1.weight") == ("model.layers", 3)
    assert layer_of("lm_head.weight") is None
    names = [f"model.layers.{layer}.w.weight" for layer in range(5)]
    names += ["vision.blocks.0.w", "vision.blocks.2.w", "single.0.w", "lm_head.weight"]
    assert layer_positions(names) == {
        **{f"model.layers.{layer}.w.weight": layer / 4 for layer in range(5)},
        "vision.blocks.0.w": 0.0,
        "vision.blocks.2.w": 1.0,
        "single.0.w": 1.0,
        "lm_head.weight": 0.0,
    }


# --- the JSON Schema


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON Schema as json_schema() uses; an unknown keyword is an error."""
    known = {"$schema", "title", "description", "type", "properties", "additionalProperties", "required"}
    known |= {"anyOf", "enum", "items", "minItems", "maxItems", "minLength", "minimum", "format"}
    known |= {"const", "maximum", "exclusiveMaximum"}
    assert schema.keys() <= known, schema.keys()
    if "anyOf" in schema and not any(valid(value, one) for one in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type", [])
    if kinds and not any(is_of(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return False
    if isinstance(value, int | float) and value < schema.get("minimum", value):
        return False
    if isinstance(value, int | float) and not value <= schema.get("maximum", value) < schema.get(
        "exclusiveMaximum", 1e99
    ):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(valid(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        fields, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", ())) <= value.keys():
            return False
        for key, item in value.items():
            if key in fields:
                if not valid(item, fields[key]):
                    return False
            elif others is False or (isinstance(others, dict) and not valid(item, others)):
                return False
    return True


def is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    kinds = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict, "null": type(None)}
    return kind != "boolean" and isinstance(value, kinds[kind])


MERGES = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("train-"))


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.stem)
def test_packaged_recipes_are_valid_and_survive_a_round_trip(path: Path) -> None:
    assert all(valid(document, json_schema()) for document in yaml.safe_load_all(path.read_text()))
    recipe = read(path, METHODS, gguf_types=FILE_TYPES)
    assert read(list(yaml.safe_load_all(recipe.to_yaml())), METHODS, gguf_types=FILE_TYPES) == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("train-*.yaml")), ids=lambda path: path.stem)
def test_packaged_train_files_match_the_schema(path: Path) -> None:
    assert valid(yaml.safe_load(path.read_text()), keys.json_schema())


def test_schema_and_reader_refuse_the_same_recipes() -> None:
    good = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    bad: list[dict[str, Any]] = [
        {"modles": []},
        {"models": []},
        {"models": [{"parameters": {}}]},
        {"dtype": "bfloat61"},
        {"random_seed": -1},
        {"parameters": {"normalize": "x"}},
        {"output": {"pth": "x"}},
    ]
    assert valid(good, json_schema())
    for change in bad:
        assert not valid({**good, **change}, json_schema()), change
        with pytest.raises(RecipeError):
            read({**good, **change}, METHODS, gguf_types=FILE_TYPES)


# --- any recipe


NUMBERS = st.floats(-10, 10) | st.integers(-3, 3) | st.sampled_from(["1e-5", "2"])
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="+@"), min_size=1, max_size=12)
FILTERS = st.fixed_dictionaries(
    {"value": NUMBERS | st.lists(NUMBERS, min_size=1, max_size=3)}, optional={"filter": NAMES}
)
SETTINGS = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=4) | st.lists(FILTERS, min_size=1, max_size=3) | FILTERS
DENSITY = st.floats(0.01, 1)
ADAPTER = NAMES | st.fixed_dictionaries(
    {"adapter": NAMES}, optional={"weight": SETTINGS, "parameters": st.fixed_dictionaries({"density": DENSITY})}
)
MODEL = st.fixed_dictionaries(
    {"model": NAMES, "parameters": st.fixed_dictionaries({"weight": SETTINGS}, optional={"density": DENSITY})}
)
RECIPE = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "dare_ties"]), "base_model": NAMES},
    optional={
        "models": st.lists(MODEL, min_size=1, max_size=3, unique_by=lambda model: model["model"].strip()),
        "adapters": st.lists(ADAPTER, min_size=1, max_size=3),
        "parameters": st.fixed_dictionaries({}, optional={"normalize": st.booleans(), "lambda": NUMBERS}),
        "dtype": st.sampled_from(sorted(OUT_DTYPES)),
        "random_seed": st.integers(0, 1 << 70),
        "output": st.fixed_dictionaries(
            {}, optional={"path": NAMES, "shard_size": st.sampled_from(["5GB", 7, "1KiB"])}
        ),
    },
).filter(lambda recipe: "models" in recipe or "adapters" in recipe)


@settings(max_examples=150, deadline=None)
@given(RECIPE)
def test_any_recipe_survives_a_round_trip_through_yaml(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    try:
        recipe = read(value, METHODS, gguf_types=FILE_TYPES)
    except RecipeError as error:
        assert re.search("is not a model reference|must be a string|density", str(error)), str(error)
        return
    assert valid(yaml.safe_load(recipe.to_yaml()), json_schema()) or "1e-5" in repr(value) or "'2'" in repr(value)
    path = tmp_path_factory.getbasetemp() / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8", newline="")
    assert read(path, METHODS, gguf_types=FILE_TYPES) == recipe
