"""EVA: A begins as the directions in which the inputs of a module vary most in the training data (arXiv 2410.07170).

PEFT computes them, and gives more ranks to modules whose inputs vary more. The result is stored in the run's folder, so
that a resumed run has the same ranks. The base is not changed: B begins at 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import get_eva_state_dict, initialize_lora_eva_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergeforge.errors import RecipeError
from mergeforge.train.loop.collate import EpochShuffler
from mergeforge.train.loop.context import Batch, TrainingContext, autocast

MAX_PASSES = 20  # over the data, after which the directions must have converged
KEY = "run"


def initialize_eva(context: TrainingContext, path: Path, key: str) -> None:
    """Set A and the ranks of the model's adapter. `path`: where the result is stored; `key`: which run it is of.

    Raises RecipeError where the data is too small.
    """
    state = load_file(path) if _key_of(path) == key else _compute(context)
    if context.is_main and _key_of(path) != key:
        _store({name: tensor.contiguous().cpu() for name, tensor in state.items()}, path, key)
    state = {name: tensor.to(context.device) for name, tensor in state.items()}
    initialize_lora_eva_weights(context.model, eva_state_dict=state)
    for parameter in context.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _key_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {}).get(KEY, ""))


def _store(state: dict[str, Any], path: Path, key: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(state, partial, metadata={KEY: key})
    os.replace(partial, path)


def _compute(context: TrainingContext) -> dict[str, Any]:
    batches = _Batches(context, _largest_rank(context.model.peft_config["default"]))
    try:
        with autocast(context):
            state: dict[str, Any] = get_eva_state_dict(
                context.model,
                batches,
                forward_fn=_forward(context),
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
    except ValueError as error:
        raise RecipeError(f"lora.init: eva fails: {error}", hint="set a lower lora.r, or init: default") from None
    return state


def _largest_rank(config: Any) -> int:
    """The ranks that a module may get: as many directions are computed for each."""
    return int(max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho + 0.5)


def _forward(context: TrainingContext) -> Any:
    """The pass that PEFT observes: without logits, unless the head has an adapter."""
    base = context.base_model
    head = base.get_output_embeddings()
    body = base if head is None or hasattr(head, "lora_A") else base.base_model

    def forward(model: Any, batch: Batch) -> None:
        body(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)

    return forward


class _Batches:
    """The training data in batches of at least `size` trained tokens, which an SVD of `size` directions needs."""

    def __init__(self, context: TrainingContext, size: int) -> None:
        self._context = context
        self._batches = list(_batch_indices(context, size))
        self._passes = 0
        if not self._batches:
            text = f"lora.init: eva needs {size} trained tokens for lora.r, and the data has fewer"
            raise RecipeError(text, hint="set a lower lora.r, or init: default")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self._passes += 1
        if self._passes > MAX_PASSES:
            raise ValueError(f"its directions do not converge in {MAX_PASSES} passes over the data")
        for indices in self._batches:
            batch = self._context.collator()([self._context.train[index] for index in indices])
            yield {name: batch[name] for name in ("input_ids", "position_ids", "labels")}


def _batch_indices(context: TrainingContext, size: int) -> Iterator[list[int]]:
    """Sequences in the order of the first epoch, in groups with enough trained tokens."""
    group, tokens = list[int](), 0
    for index in EpochShuffler(len(context.train), context.settings.seed):
        group.append(index)
        labels = context.collator()([context.train[index]])["labels"]
        tokens += int((labels != -100).sum())
        if tokens >= size and len(group) >= context.schedule.micro_batch:
            yield group
            group, tokens = [], 0
