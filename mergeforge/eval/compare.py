"""Compares models on the same rows: which is better than the first, and is the difference more than chance?"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from mergeforge.core.messages import WarningText
from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import ModelBackend
from mergeforge.eval.bootstrap import MIN_ROWS, ConfidenceInterval, paired_bootstrap
from mergeforge.eval.dataset import EvalData, RowList, make_rows
from mergeforge.eval.evaluate import Evaluation, Progress, RowResult, evaluate_rows
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, Sampling

PER_TOKEN, PER_BYTE = "nats per token", "bits per byte"
StartProgress = Callable[[str], Progress | None]  # model name -> the callback for its progress


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the same rows; `intervals`: how far each one after the first is above the first.

    `measure`: nats per token if all models see exactly the same tokens, else bits per byte.
    """

    evaluations: tuple[Evaluation, ...]
    intervals: tuple[ConfidenceInterval, ...]
    measure: str
    rows: int
    left_out: int  # rows that do not fit all models
    other_text: int = 0  # rows left out because their answers have other bytes for some models

    @property
    def worse(self) -> list[str]:
        """The models that are worse than the first beyond chance."""
        pairs = zip(self.evaluations[1:], self.intervals, strict=True)
        return [evaluation.model for evaluation, interval in pairs if interval.verdict == "worse"]

    @property
    def notes(self) -> list[str]:
        """What to know before trusting the numbers."""
        notes: list[str] = list(dict.fromkeys(text for item in self.evaluations for text in item.warnings))
        if self.other_text:
            text = f"{self.other_text} rows are left out: with the models' own templates their answers are other text"
            notes.append(WarningText(text))
        if self.measure == PER_BYTE:
            notes.append("the models tokenize the rows differently, so bits per byte are compared, not NLL")
        if self.rows < MIN_ROWS:
            notes.append(f"only {self.rows} rows: with fewer than {MIN_ROWS} the interval is often too narrow")
        if self.left_out:
            notes.append(f"{self.left_out} rows are left out: too long for one of the models, or without scored tokens")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        models = [evaluation.as_dict() for evaluation in self.evaluations]
        for model, interval in zip(models[1:], self.intervals, strict=True):
            bounds = {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}
            model["against_first"] = bounds | {"verdict": interval.verdict}
        facts = {"measure": self.measure, "rows": self.rows, "left_out": self.left_out, "notes": self.notes}
        return facts | {"models": models}


def compare(
    models: Sequence[str | Path],
    data: EvalData,
    *,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    margin: float = 0.0,
    start_progress: StartProgress | None = None,
    **open_options: Any,
) -> Comparison:
    """Evaluate models on the rows that fit all of them, one model in memory at a time.

    margin: differences below it are ties, in nats per token or bits per byte. A single adapter is compared with its own
    base, without a second model in memory. Raises RecipeError and SourceError.
    """
    if not models:
        raise RecipeError("there is nothing to compare")
    evaluations: list[Evaluation] = []
    fingerprints: list[dict[int, str]] = []
    for model in _open_models(models, open_options):
        with tempfile.TemporaryDirectory(prefix="mergeforge-compare-") as folder:
            rows = make_rows(data, model, Path(folder))
            progress = start_progress(model.name) if start_progress else None
            evaluations.append(evaluate_rows(model, rows, limit, batch, samples, sampling, progress))
            fingerprints.append(_fingerprints(rows.rows, evaluations[-1].rows))
        del model, rows  # before the next one is loaded
    return compare_evaluations(evaluations, fingerprints, margin)


def compare_evaluations(
    evaluations: Sequence[Evaluation], fingerprints: Sequence[Mapping[int, str]], margin: float = 0.0
) -> Comparison:
    """Compare finished evaluations. fingerprints: for each, row key -> hash of its tokens. Raises SourceError."""
    by_key = [_sums_by_key(evaluation.rows) for evaluation in evaluations]
    common = [key for key in by_key[0] if all(key in rows for rows in by_key)]
    if not common:
        raise SourceError("no row fits all models")
    same_tokens = all(hashes[key] == fingerprints[0][key] for hashes in fingerprints for key in common)
    other_text = 0
    if not same_tokens:
        equal = _same_bytes(common, by_key)
        common, other_text = equal, len(common) - len(equal)
    first, *others = [[_ratio_terms(rows[key], same_tokens) for key in common] for rows in by_key]
    intervals = tuple(paired_bootstrap(first, other, margin=margin) for other in others)
    left_out = len(set().union(*by_key)) - len(common) - other_text
    common_keys = set(common)
    reduced = tuple(
        replace(evaluation, rows=tuple(row for row in evaluation.rows if row.key in common_keys))
        for evaluation in evaluations
    )
    measure = PER_TOKEN if same_tokens else PER_BYTE
    return Comparison(reduced, intervals, measure, len(common), left_out, other_text)


def _same_bytes(keys: Sequence[int], by_key: Sequence[Mapping[int, RowResult]]) -> list[int]:
    """The rows whose answers are the same number of bytes for all models, so that bits per byte can be compared.

    Raises SourceError where there is none.
    """
    if not all(any(rows[key].nbytes for key in keys) for rows in by_key):
        raise SourceError("the models tokenize the rows differently, and the rows have no text to count bytes of")
    same = [key for key in keys if len({rows[key].nbytes for rows in by_key}) == 1 and by_key[0][key].nbytes]
    if not same:
        text = "the models tokenize the rows differently, and their templates make other text of every answer"
        raise SourceError(text, hint="use one template for all of them: --template FILE")
    return same


def _open_models(models: Sequence[str | Path], open_options: dict[str, Any]) -> Iterator[ModelBackend]:
    """Open each model when it is needed; the caller drops the previous one first."""
    if len(models) == 1:
        from mergeforge.eval.transformers_backend import TransformersModel

        adapter = open_model(models[0], **open_options)
        if not isinstance(adapter, TransformersModel) or adapter.kind != "adapter":
            raise RecipeError(
                f"{models[0]} is the only model, and not an adapter", hint="mergeforge compare A B --data FILE"
            )
        yield adapter.base()
        yield adapter
        return
    for model in models:
        gc.collect()
        yield open_model(model, **open_options)


def _sums_by_key(rows: Sequence[RowResult]) -> dict[int, RowResult]:
    """Sums by row key: a template may make several examples of one row, and a row may occur twice."""
    sums: dict[int, RowResult] = {}
    for row in rows:
        previous = sums.get(row.key)
        sums[row.key] = row if previous is None else _add(previous, row)
    return sums


def _add(first: RowResult, second: RowResult) -> RowResult:
    return replace(
        first,
        nll=first.nll + second.nll,
        tokens=first.tokens + second.tokens,
        correct=first.correct + second.correct,
        nbytes=first.nbytes + second.nbytes,
    )


def _ratio_terms(row: RowResult, per_token: bool) -> tuple[float, float]:
    return (row.nll, row.tokens) if per_token else (row.nll / math.log(2), row.nbytes)


def _fingerprints(rows: RowList, results: Sequence[RowResult]) -> dict[int, str]:
    """Row key -> hash of the tokens and labels of all examples with that key."""
    hashes: dict[int, str] = {}
    for result in results:
        row = rows[result.row]
        hashes[result.key] = xxhash.xxh3_64_hexdigest(
            hashes.get(result.key, "").encode() + row.tokens.tobytes() + row.labels.tobytes()
        )
    return hashes
