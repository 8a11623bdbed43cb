"""classes.json against what tools/gguf_classes derives now."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import PACKAGE
from support.quiet import quiet
from support.tools import load_tool

from mergeforge.gguf.hf_model.shapes import stored_shape


@pytest.mark.slow
def test_the_table_is_what_the_tool_derives() -> None:
    """All classes, with the installed transformers; run tools/gguf_classes after a change of gguf/architectures."""
    stored: dict[str, Any] = json.loads((PACKAGE / "gguf" / "hf_model" / "classes.json").read_text(encoding="utf-8"))
    with quiet():
        derived = load_tool("gguf_classes").table()
    assert [name for name in stored.keys() | derived.keys() if stored.get(name) != derived.get(name)] == []
    assert list(stored) == list(derived)


def test_keys_are_found_by_changing_config_values() -> None:
    """Granite's multipliers: each key follows the value of the same meaning, and no other."""
    with quiet():
        (entry,) = load_tool("gguf_classes").table(["granite"]).values()
    assert entry["arch"] == "granite"
    multipliers = {key: paths for key, paths in entry["keys"].items() if key.endswith("scale")}
    assert multipliers == {
        "attention.scale": ["attention_multiplier"],
        "embedding_scale": ["embedding_multiplier"],
        "residual_scale": ["residual_multiplier"],
        "logit_scale": ["logits_scaling"],
    }
    pattern = entry["variants"][0]["model.layers.{block}.self_attn.q_proj.weight"]
    assert pattern == ["same", "blk.{block}.attn_q.weight"]
    assert entry["flags"]["attention_bias"] == [True, "model.layers.{block}.self_attn.k_proj.bias"]


@pytest.mark.parametrize(
    ("form", "shapes", "expected"),
    [
        ("part", [(8, 6, 4)], (6, 4)),
        ("convolution", [(8, 4)], (8, 1, 4)),
        ("transposed", [(2, 6, 4)], (2, 4, 6)),
        ("joined", [(2, 6, 4), (2, 6, 4)], (2, 12, 4)),
        ("joined transposed", [(2, 6, 4), (2, 6, 4)], (2, 4, 12)),
        ("joined columns", [(6,), (2,), (2,)], (10,)),
        ("heads", [(4, 16, 8), (4, 6, 16)], (4 * (8 + 6), 16)),
    ],
)
def test_forms_give_shapes(form: str, shapes: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert stored_shape(form, shapes) == expected
