"""Models side by side on the same rows: which is better than the first, and is that more than chance?"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import Answerer
from mergeforge.eval.bootstrap import FEWEST, Interval, paired
from mergeforge.eval.dataset import Data, RowList, rows_of
from mergeforge.eval.evaluate import Evaluation, Progress, RowResult, score
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, Sampling

PER_TOKEN, PER_BYTE = "nats a token", "bits a byte"
Tell = Callable[[str], Progress | None]


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the same rows; `intervals`: of each but the first, how far it lies above the first.

    `measure`: nats a token where all models see the very same tokens, else bits a byte.
    """

    evaluations: tuple[Evaluation, ...]
    intervals: tuple[Interval, ...]
    measure: str
    rows: int
    left_out: int  # rows that not all models could take

    @property
    def worse(self) -> list[str]:
        """The models that are worse than the first beyond chance."""
        pairs = zip(self.evaluations[1:], self.intervals, strict=True)
        return [one.model for one, interval in pairs if interval.verdict == "worse"]

    @property
    def notes(self) -> list[str]:
        """What to know before the numbers are believed."""
        found = []
        if self.measure == PER_BYTE:
            found.append("the models cut the rows into different tokens, so bits per byte decide, not NLL")
        if self.rows < FEWEST:
            found.append(f"{self.rows} rows are few: an interval of fewer than {FEWEST} is often too narrow")
        if self.left_out:
            found.append(
                f"{self.left_out} rows are left out: too long for one of the models, or nothing of them counts"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything for JSON."""
        models = [one.as_dict() for one in self.evaluations]
        for model, interval in zip(models[1:], self.intervals, strict=True):
            bounds = {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}
            model["against_first"] = bounds | {"verdict": interval.verdict}
        facts = {"measure": self.measure, "rows": self.rows, "left_out": self.left_out, "notes": self.notes}
        return facts | {"models": models}


def compare(
    models: Sequence[str | Path],
    data: Data,
    *,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    margin: float = 0.0,
    tell: Tell | None = None,
    **opening: Any,
) -> Comparison:
    """Evaluate models on the rows that all of them can take, one after another in memory.

    `margin`: smaller differences are none, in nats a token or bits a byte.
    A single adapter is compared with its own base, which takes no second model. Raises RecipeError and SourceError.
    """
    if not models:
        raise RecipeError("there is nothing to compare")
    found: list[Evaluation] = []
    prints: list[dict[int, str]] = []
    for answerer in _opened(models, opening):
        with tempfile.TemporaryDirectory(prefix="mergeforge-compare-") as folder:
            rows = rows_of(data, answerer, Path(folder))
            progress = tell(answerer.name) if tell else None
            found.append(score(answerer, rows, limit, batch, samples, sampling, progress))
            prints.append(_fingerprints(rows.rows, found[-1].rows))
        del answerer, rows  # before the next one is loaded
    return side_by_side(found, prints, margin)


def side_by_side(
    evaluations: Sequence[Evaluation], prints: Sequence[Mapping[int, str]], margin: float = 0.0
) -> Comparison:
    """The comparison of evaluations; `prints`: for each of them, key -> digest of the tokens. Raises SourceError."""
    units = [_by_key(one.rows) for one in evaluations]
    common = [key for key in units[0] if all(key in one for one in units)]
    if not common:
        raise SourceError("there is no row that all models can take")
    same = all(one[key] == prints[0][key] for one in prints for key in common)
    if not same and not all(any(one[key].nbytes for key in common) for one in units):
        raise SourceError("the models cut the rows into different tokens, and there is no text to count bytes of")
    first, *others = [[_ratio(one[key], same) for key in common] for one in units]
    intervals = tuple(paired(first, other, margin=margin) for other in others)
    left_out = len(set().union(*units)) - len(common)
    kept = tuple(replace(one, rows=tuple(row for row in one.rows if row.key in set(common))) for one in evaluations)
    return Comparison(kept, intervals, PER_TOKEN if same else PER_BYTE, len(common), left_out)


def _opened(models: Sequence[str | Path], opening: dict[str, Any]) -> Iterator[Answerer]:
    """Each model when its turn comes; who takes the next has dropped the last."""
    if len(models) == 1:
        from mergeforge.eval.transformers_backend import TorchModel

        one = open_model(models[0], **opening)
        if not isinstance(one, TorchModel) or one.kind != "adapter":
            raise RecipeError(f"{models[0]} is alone and no adapter", hint="mergeforge compare A B --data FILE")
        yield one.base()
        yield one
        return
    for model in models:
        gc.collect()
        yield open_model(model, **opening)


def _by_key(rows: Sequence[RowResult]) -> dict[int, RowResult]:
    """Sums by key: templates may make several examples of one row, and a row may stand there twice."""
    found: dict[int, RowResult] = {}
    for row in rows:
        old = found.get(row.key)
        found[row.key] = row if old is None else _sum(old, row)
    return found


def _sum(one: RowResult, other: RowResult) -> RowResult:
    return replace(
        one,
        nll=one.nll + other.nll,
        tokens=one.tokens + other.tokens,
        correct=one.correct + other.correct,
        nbytes=one.nbytes + other.nbytes,
    )


def _ratio(row: RowResult, per_token: bool) -> tuple[float, float]:
    return (row.nll, row.tokens) if per_token else (row.nll / math.log(2), row.nbytes)


def _fingerprints(rows: RowList, scored: Sequence[RowResult]) -> dict[int, str]:
    """Key -> digest of the tokens and labels of all examples that have it."""
    found: dict[int, str] = {}
    for one in scored:
        row = rows[one.row]
        found[one.key] = xxhash.xxh3_64_hexdigest(
            found.get(one.key, "").encode() + row.tokens.tobytes() + row.labels.tobytes()
        )
    return found
