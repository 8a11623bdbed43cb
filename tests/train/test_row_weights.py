"""Row weights: the column `weight` of the data in the training loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import have_same_adapter, interrupt_at, losses, run
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeforge.errors import RecipeError
from mergeforge.train.plan import make_plan

Settings = dict[str, Any]


def own_loss(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum") / count


@pytest.fixture
def weighted(settings: Settings) -> Settings:
    """Settings whose 40 rows have the weights 0.3, 1 and 2 in turn."""
    return settings | {"data": str(write_weights(Path(settings["data"]), (0.3, 1, 2)))}


def write_weights(path: Path, weights: tuple[float, ...]) -> Path:
    """A copy of a file of rows with these weights in turn."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    copy = path.with_name(f"weighted-{len(list(path.parent.iterdir()))}.jsonl")
    lines = [json.dumps(row | {"weight": weights[index % len(weights)]}) for index, row in enumerate(rows)]
    copy.write_text("\n".join(lines))
    return copy


def test_only_the_proportions_of_weights_matter(settings: Settings, weighted: Settings) -> None:
    rows = Path(settings["data"])
    plain, with_weights = run(settings), run(weighted, output="weighted")
    threes = run(settings, data=str(write_weights(rows, (3,))), output="threes")
    tripled = run(settings, data=str(write_weights(rows, (0.9, 3, 6))), output="tripled")
    assert losses(threes) == losses(plain)
    assert losses(tripled) == pytest.approx(losses(with_weights), rel=1e-5)
    assert losses(with_weights)[-1] != pytest.approx(losses(plain)[-1], rel=1e-4)


def test_a_step_has_one_loss_packed_padded_and_accumulated(weighted: Settings) -> None:
    """One step on all rows with their weights: in one pass, in twenty, and packed; and both loops."""
    changes: Settings = {"lr": 1e-4, "max_steps": 2, "warmup": 0}
    whole = run(weighted, **changes, batch={"size": 40, "micro": 40})
    expected = pytest.approx(losses(whole), rel=1e-5)
    assert losses(run(weighted, **changes, batch={"size": 40, "micro": 2}, output="accumulated")) == expected
    assert losses(run(weighted, **changes, batch={"size": 40, "micro": 4}, pack=True, output="packed")) == expected
    assert losses(run(weighted, **changes, batch={"size": 40, "micro": 8}, loop="simple", output="simple")) == expected


def test_a_weighted_run_resumes_bit_for_bit(weighted: Settings) -> None:
    changes: Settings = {"val": 4, "save": {"every": 3, "best": False}}
    whole = run(weighted, **changes)
    run(weighted, listeners=[interrupt_at(4)], **changes, output="interrupted")
    resumed = run(weighted, **changes, output="interrupted")
    assert losses(resumed) == losses(whole) and have_same_adapter(whole, resumed)


def test_validation_counts_all_rows_alike(settings: Settings, weighted: Settings) -> None:
    """The validation loss of a run that learns nothing, with weights and without."""
    plain, with_weights = (
        run(changed, val=8, lr=0, max_steps=1, output=str(number))
        for number, changed in enumerate((settings, weighted))
    )
    assert losses(plain, "eval_loss") == losses(with_weights, "eval_loss")


def test_the_plan_tells_of_weights(weighted: Settings) -> None:
    assert "rows count 0.3 to 2 times in the loss, by their weights" in make_plan(weighted, device="cpu").data.notes


def test_another_column_can_hold_the_weights(settings: Settings) -> None:
    rows = [{"prompt": f"q{index}", "response": "a", "quality": 0.1 * index} for index in range(1, 5)]
    Path(settings["data"]).write_text("\n".join(map(json.dumps, rows)))
    data = [{"path": settings["data"], "columns": {"weight": "quality"}}]
    assert make_plan(settings | {"data": data}, device="cpu").data.train.weight_range() == pytest.approx((0.1, 0.4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": f"{__name__}.own_loss"}, "does not take the weights of rows"),
        ({"batch": {"size": 1}}, "a step has one row, and those of the data are 0.3 to 2"),
    ],
)
def test_weights_without_an_effect_are_refused(changes: Settings, message: str, weighted: Settings) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(weighted | changes, device="cpu")


def test_preference_objectives_refuse_weights(preferences: Settings) -> None:
    data = str(write_weights(Path(preferences["data"]), (0.3, 1)))
    with pytest.raises(RecipeError, match="objective: dpo cannot weight rows"):
        make_plan(preferences | {"data": data}, device="cpu")
