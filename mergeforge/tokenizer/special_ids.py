"""Special token ids in config.json and generation_config.json when the tokenizer is not the first model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergeforge.tokenizer.hf_files import ROLES
from mergeforge.tokenizer.hf_vocabulary import ModelVocabulary
from mergeforge.tokenizer.output_vocabulary import OutputVocabulary
from mergeforge.tokenizer.settings import TokenizerPlan

if TYPE_CHECKING:
    from mergeforge.tokenizer.settings import Rows

_SUFFIXES = ("_token_id", "_token_index")


def special_ids(first: ModelVocabulary, source: ModelVocabulary, output: OutputVocabulary) -> dict[str, int]:
    """The ids of the source model's special tokens by config key, where they differ from the first model's."""
    after = {role: output.ids[source.roles[role]] for role in ROLES if source.roles.get(role) in output.ids}
    before = {role: first.ids.get(text) for role, text in first.roles.items()}
    return {f"{role}_token_id": number for role, number in after.items() if before.get(role) != number}


def remap_special_ids(values: Mapping[str, Any], plan: TokenizerPlan, label: str) -> dict[str, Any]:
    """Return a model's config.json or generation_config.json with the ids that its tokens have in the output.

    The source model's ids stay as they are. Ids of tokens that the output lacks are dropped, unless the plan has an
    id for their role.
    """
    if label == plan.source_model:
        return dict(values)
    rows = plan.row_sources[label].own
    remapped: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            remapped[key] = remap_special_ids(value, plan, label)
        elif key in plan.special_ids:
            remapped[key] = _with_role(plan.special_ids[key], value, rows)
        elif key.endswith(_SUFFIXES) and value is not None:
            ids = _output_ids(value if isinstance(value, list) else [value], rows)
            if ids:
                remapped[key] = ids if isinstance(value, list) else ids[0]
        else:
            remapped[key] = value
    return remapped


def _with_role(number: int, value: Any, rows: Rows) -> Any:
    """The role's id; in a list of ids, it comes first."""
    if not isinstance(value, list):
        return number
    return list(dict.fromkeys([number, *_output_ids(value, rows)]))


def _output_ids(numbers: list[Any], rows: Rows) -> list[int]:
    """The ids in the output of tokens given by their ids in the model; unknown ones are left out."""
    import numpy as np

    places = [np.flatnonzero(rows == number)[:1].tolist() for number in numbers if isinstance(number, int)]
    return [place[0] for place, number in zip(places, numbers, strict=True) if place and number >= 0]
