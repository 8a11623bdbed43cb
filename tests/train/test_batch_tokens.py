"""The tokens of the largest batch: counted by hand, and against the batches that a run makes."""

from __future__ import annotations

from typing import Any

import pytest

from mergeforge.train.batch_tokens import WIDTH_MULTIPLE, largest_batch
from mergeforge.train.loop import collate
from mergeforge.train.loop.setup import make_context
from mergeforge.train.plan import make_plan
from mergeforge.train.settings import LoraOptions, read
from mergeforge.train.training_setup import TrainingSetup

SETUP = TrainingSetup("lora", LoraOptions(r=16), 64, 4, "adamw", 4, ce_chunk=0, checkpointing=False, on_gpu=False)


@pytest.mark.parametrize(
    ("lengths", "size", "packed", "expected"),
    [
        ([30, 25, 20, 20], 4, True, 2 * 56),  # packs of 55 and 40 tokens
        ([30, 25, 20, 20], 2, True, 56),  # a step of two rows is one pack
        ([30, 20, 20, 10], 4, False, 4 * 32),  # all padded to the longest
        ([30, 20, 20, 10], 3, False, 3 * 32),
        ([30], 8, False, 32),  # no more sequences than rows
        ([99, 10], 1, False, 64),  # longer than seq_len
    ],
)
def test_examples_worked_by_hand(lengths: list[int], size: int, packed: bool, expected: int) -> None:
    settings = read({"model": "m", "data": "d", "batch": {"size": size}})
    assert largest_batch(lengths, settings, SETUP, packed=packed) == expected


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("data", ["settings", "preferences"])
def test_the_largest_batch_of_a_run(data: str, packed: bool, request: pytest.FixtureRequest) -> None:
    """The count against the longest sequences of an epoch in one batch, collated as the loop does it."""
    settings = request.getfixturevalue(data) | {"pack": packed, "seq_len": 256, "batch": {"size": 4}}
    plan = make_plan(settings, device="cpu")
    context, _ = make_context(plan)
    sequences = sorted((context.train[index] for index in range(len(context.train))), key=_longest(packed))
    batch = context.collator(weighted=False)(sequences[-context.schedule.micro_batch :])
    count = largest_batch(plan.data.train.lengths, plan.settings, plan.resolved.setup, packed=packed)
    assert count == batch["input_ids"].numel()


def _longest(packed: bool) -> Any:
    return lambda sequence: (sum if packed else max)(len(row.tokens) for row in sequence)


def test_the_width_is_rounded_as_in_the_loop() -> None:
    assert WIDTH_MULTIPLE == collate.WIDTH_MULTIPLE
