"""The step-by-step functions, and lists of dicts as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeforge.eval import evaluate
from mergeforge.train import QuickTrainer, SimpleTrainer, load_dataset, load_model, make_plan, prepare_dataset


def test_steps_see_the_data_that_a_plan_sees(settings: dict[str, Any], here: Path) -> None:
    """The tokens of a file, of its rows as a list, and of a plan are equal; so are the scores of a model."""
    rows = load_dataset(settings["data"])
    assert len(rows) == 40 and rows[0].keys() == {"prompt", "response"}
    from_list, from_file = (prepare_dataset(data, settings["model"], folder=here) for data in (rows, settings["data"]))
    planned = make_plan(settings | {"data": rows}, device="cpu").data
    stores = [prepared.train for prepared in (from_list, from_file, planned)]
    for index in range(40):
        assert len({tuple(store[index].tokens.tolist()) for store in stores}) == 1
    model = load_model(settings["model"], device="cpu")
    assert evaluate(model, rows).nll == evaluate(model, settings["data"]).nll
    assert SimpleTrainer is QuickTrainer
