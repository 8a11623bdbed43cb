"""lm-evaluation-harness on a model that is already open (package lm-eval)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import ModelBackend, require
from mergeforge.eval.transformers_backend import TransformersModel


def run_tasks(model: ModelBackend, tasks: Sequence[str], *, limit: int | None = None, batch: int = 8) -> dict[str, Any]:
    """Task -> measure -> number, by lm_eval's simple_evaluate. Raises MissingExtraError and RecipeError."""
    if not isinstance(model, TransformersModel):
        text = f"{model.name} runs in llama.cpp, but lm-eval needs transformers"
        raise RecipeError(text, hint="give the model's folder instead")
    lm_eval = require("lm_eval")
    wrapped = require("lm_eval.models.huggingface").HFLM(
        pretrained=model.loaded.model, tokenizer=model.tokenizer, batch_size=batch
    )
    try:
        results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    except (KeyError, ValueError) as error:
        raise SourceError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from None
    return {
        task: {name: value for name, value in measures.items() if isinstance(value, int | float)}
        for task, measures in results.items()
    }
