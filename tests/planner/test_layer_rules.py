"""The configs of stacked layers, for every model type of transformers that derives something from layer numbers.

What transformers makes of the stacked config is compared with what it makes of the config of the stack's source.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import PACKAGE
from support.quiet import quiet
from support.tools import load_tool

from mergeforge.errors import RecipeError
from mergeforge.planner.layer_slices import LayerStack, SourceModel
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.planner.stacked_config import stacked_config

TABLE: dict[str, Any] = json.loads((PACKAGE / "planner" / "hf_layer_rules.json").read_text(encoding="utf-8"))
WITH_LISTS = [name for name, rules in TABLE["types"].items() if "lists" in rules]
DEPTH = 12
STACK = [*range(8), *range(5, 12)]  # no period of less than 3 is kept
QUICK = ["gemma2", "qwen3_next", "olmo3", "qwen2", "deepseek_v3", "ernie4_5_moe"]
REFUSED = ("inkling2_loop_text", "inkling2_text")  # model types whose layers form blocks


def made(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet():
        values: dict[str, Any] = CONFIG_MAPPING[model_type](**config).to_dict()
    return values


def stacked(config: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    source = SourceModel("base", ModelTensors("base", config, {}), {})
    return stacked_config(config, [LayerStack("model.layers", tuple((source, number) for number in numbers))])


def check(model_type: str, config: dict[str, Any]) -> None:
    names = TABLE["types"][model_type]["lists"]
    before = made(model_type, config)
    if any(len(before[name]) != DEPTH for name in names):
        pytest.skip("its lists have another length")
    try:
        result = stacked(config, STACK)
    except RecipeError:
        assert model_type in REFUSED
        return
    after = made(model_type, result)
    assert {name: after[name] for name in names} == {name: [before[name][at] for at in STACK] for name in names}


@pytest.mark.parametrize("model_type", WITH_LISTS)
def test_stacked_layers_keep_their_kinds(model_type: str) -> None:
    """With the defaults of the class, for a config.json that holds no list."""
    check(model_type, {"model_type": model_type, "num_hidden_layers": DEPTH})


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}),
        ("gemma3_text", {"sliding_window_pattern": 4}),
        ("cohere2", {"sliding_window_pattern": 3}),
        ("qwen3_next", {"full_attention_interval": 3}),
        ("smollm3", {"no_rope_layer_interval": 3}),
        ("modernbert", {"global_attn_every_n_layers": 4}),
        ("exaone4", {"sliding_window_pattern": 3, "sliding_window": 8}),
    ],
)
def test_keys_that_change_the_rule_are_followed(model_type: str, changes: dict[str, Any]) -> None:
    check(model_type, {"model_type": model_type, "num_hidden_layers": DEPTH, **changes})


@pytest.mark.parametrize(
    "config, problem",
    [
        ({"model_type": "ernie4_5_moe", "moe_layer_interval": 2}, "'moe_layer_interval: 2'"),
        ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 6}, "compares layer numbers with"),
        ({"model_type": "rwkv", "rescale_every": 4}, "'rescale_every: 4'"),
        ({"model_type": "made_up", "full_attention_frequency": 4}, "'full_attention_frequency: 4'"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 6}, "only at the start"),
    ],
)
def test_what_no_list_can_say_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        stacked({"num_hidden_layers": DEPTH, **config}, STACK)


@pytest.mark.parametrize("names", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_table_is_what_the_tool_makes(names: list[str] | None) -> None:
    import transformers

    if TABLE["transformers"] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {TABLE['transformers']}")
    with quiet():
        types = load_tool("hf_layer_rules").table(names)["types"]
    assert types == {name: TABLE["types"][name] for name in names or TABLE["types"]}
