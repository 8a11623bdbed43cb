"""lm-evaluation-harness on a model that is open already (extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import Answerer
from mergeforge.eval.extras import extra
from mergeforge.eval.transformers_backend import TorchModel


def run_tasks(answerer: Answerer, tasks: Sequence[str], *, limit: int | None = None, batch: int = 8) -> dict[str, Any]:
    """Task -> measure -> number, by lm_eval's simple_evaluate. Raises MissingExtraError and RecipeError."""
    if not isinstance(answerer, TorchModel):
        raise RecipeError(f"{answerer.name} runs in llama.cpp, lm-eval in transformers", hint="give the folder instead")
    lm_eval = extra("lm_eval", "eval")
    model = extra("lm_eval.models.huggingface", "eval").HFLM(
        pretrained=answerer.loaded.model, tokenizer=answerer.tokenizer, batch_size=batch
    )
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit)
    except (KeyError, ValueError) as error:
        raise SourceError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from None
    return {
        task: {name: value for name, value in measures.items() if isinstance(value, int | float)}
        for task, measures in found["results"].items()
    }
