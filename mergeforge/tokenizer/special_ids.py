"""Special token ids of config.json and generation_config.json, where the tokenizer is not the first model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergeforge.tokenizer.hf_vocabulary import ROLES, Vocabulary
from mergeforge.tokenizer.output_vocabulary import Output
from mergeforge.tokenizer.settings import TokenizerPlan

if TYPE_CHECKING:
    from mergeforge.tokenizer.settings import Rows

_ENDS = ("_token_id", "_token_index")


def special_ids(first: Vocabulary, donor: Vocabulary, output: Output) -> dict[str, int]:
    """The donor's special tokens' ids by key, where they are not those of the first model."""
    now = {role: output.ids[donor.named[role]] for role in ROLES if donor.named.get(role) in output.ids}
    before = {role: first.ids.get(text) for role, text in first.named.items()}
    return {f"{role}_token_id": number for role, number in now.items() if before.get(role) != number}


def moved_ids(values: Mapping[str, Any], plan: TokenizerPlan, label: str) -> dict[str, Any]:
    """config.json or generation_config.json of a model, with the ids that its tokens have in the output.

    The donor's stay as they are. A token that the output lacks keeps no id: a lone one is dropped
    unless the plan has one for its role.
    """
    if label == plan.donor:
        return dict(values)
    rows = plan.picks[label].own
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found[key] = moved_ids(value, plan, label)
        elif key in plan.special_ids:
            found[key] = _with_role(plan.special_ids[key], value, rows)
        elif key.endswith(_ENDS) and value is not None:
            moved = _moved(value if isinstance(value, list) else [value], rows)
            if moved:
                found[key] = moved if isinstance(value, list) else moved[0]
        else:
            found[key] = value
    return found


def _with_role(number: int, value: Any, rows: Rows) -> Any:
    """The role's id; of several, it comes first."""
    if not isinstance(value, list):
        return number
    return list(dict.fromkeys([number, *_moved(value, rows)]))


def _moved(numbers: list[Any], rows: Rows) -> list[int]:
    """The output's ids of the tokens that these were in the model."""
    import numpy as np

    places = [np.flatnonzero(rows == number)[:1].tolist() for number in numbers if isinstance(number, int)]
    return [place[0] for place, number in zip(places, numbers, strict=True) if place and number >= 0]
