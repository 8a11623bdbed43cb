"""Rotary positions of adapters that were trained on a base with scaled ones.

Such an adapter has a config.json beside it (`mergeforge train` and axolotl write it). The merged model computes
positions as the adapter's base did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.rope import FULL_ATTENTION, with_positions_of
from mergeforge.core.messages import WarningText
from mergeforge.planner.model_facts import model_types, rope_facts


def with_adapter_positions(
    config: Mapping[str, Any], adapters: Sequence[Adapter]
) -> tuple[Mapping[str, Any], list[str]]:
    """The config of a model with these adapters folded in, and notes on the positions that it takes from them."""
    own = {adapter.label: _config_of(adapter, config) for adapter in adapters}
    scaled = {label: found for label, found in own.items() if _scaling(found) not in ((), _scaling(config))}
    if not scaled:
        return config, []
    label, chosen = next(iter(scaled.items()))
    kind, factor = _scaling(chosen)
    others = [other for other, found in own.items() if _scaling(found) != (kind, factor)]
    notes: list[str] = [f"positions are scaled as those of {label}: {kind}, factor {factor:g}"]
    return with_positions_of(config, chosen), [*notes, *_warnings(label, others)]


def _config_of(adapter: Adapter, base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json beside an adapter, if it is one of the base's model type; otherwise the base's."""
    path = adapter.folder / "config.json"
    config = read_json(path) if (adapter.folder / "adapter_config.json").is_file() and path.is_file() else {}
    return config if model_types(config) & model_types(base) else base


def _warnings(label: str, others: Sequence[str]) -> Iterator[WarningText]:
    for other in others:
        yield WarningText(f"{other} was trained with other positions than {label}, whose positions the result has")


def _scaling(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """(type, factor) of scaled positions; () where they are not scaled by a factor."""
    facts = rope_facts(config)
    scaling = facts.get("rope scaling") or facts.get(f"rope of {FULL_ATTENTION}") or {}
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor")
    return (kind, factor) if kind != "default" and isinstance(factor, int | float) else ()
