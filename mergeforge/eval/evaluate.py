"""How well a model predicts the answers of a data set, and what it answers itself."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.data import Counts
from mergeforge.errors import SourceError
from mergeforge.eval.backend import Answer, Answerer, Row, RowScore, TooLong
from mergeforge.eval.dataset import Data, Rows, counts_anything, nbytes, rows_of, spans
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, Sampling
from mergeforge.eval.stop_strings import decoded

Progress = Callable[[int, int], object]  # rows done, rows in all
CHARACTERS = 2000  # of a sample's prompt that are kept, from its end


@dataclass(frozen=True)
class RowResult:
    """A row's sums. `row`: its place among the rows; `key`: the same for the same content, whatever the tokenizer.

    `nbytes`: of the counted tokens' text in UTF-8, marks left out.
    """

    row: int
    key: int
    nll: float
    tokens: int
    correct: int
    nbytes: int


@dataclass(frozen=True)
class Sample:
    """The model's own answer beside the expected one."""

    row: int
    prompt: str
    expected: str
    answer: Answer


@dataclass(frozen=True)
class Evaluation:
    """What was found over all rows; `seconds` and `read`: time and tokens (prompts too) of scoring."""

    model: str
    kind: str
    rows: tuple[RowResult, ...]
    left_out: int  # rows longer than the model's context, or of which nothing counts
    seconds: float
    read: int
    samples: tuple[Sample, ...] = ()
    counts: Counts | None = None  # what became of the data's rows
    template: str = ""  # that the rows were rendered with, and where it is from

    @property
    def tokens(self) -> int:
        """Counted tokens: those of the answers."""
        return sum(row.tokens for row in self.rows)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a counted token, in nats."""
        return _ratio(math.fsum(row.nll for row in self.rows), self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf if self.nll > 0 else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the answers' text, the marks that end them included."""
        return _ratio(math.fsum(row.nll for row in self.rows) / math.log(2), sum(row.nbytes for row in self.rows))

    @property
    def accuracy(self) -> float:
        """Share of counted tokens that are the likeliest one after what really stands before them."""
        return _ratio(sum(row.correct for row in self.rows), self.tokens)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(row.nll) for row in self.rows)

    @property
    def speed(self) -> float:
        """Tokens read a second, prompts included."""
        return _ratio(self.read, self.seconds)

    @property
    def answer_speed(self) -> float:
        """Tokens written a second, the median of the samples; nan without any."""
        return _median([one.answer.speed for one in self.samples])

    @property
    def first_token(self) -> float:
        """Seconds until a sample's first token, the median; nan without any."""
        return _median([one.answer.first for one in self.samples if one.answer.tokens])

    def as_dict(self) -> dict[str, Any]:
        """Everything for JSON; what is not a number is None."""
        sums = {name: _plain(getattr(self, name)) for name in NUMBERS}
        return {"model": self.model, "kind": self.kind, "rows": len(self.rows), "left_out": self.left_out} | sums


NUMBERS = (
    "tokens",
    "nll",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "seconds",
    "speed",
    "answer_speed",
    "first_token",
)


def evaluate(
    model: str | Path | Answerer,
    data: Data,
    *,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    progress: Progress | None = None,
    **opening: Any,
) -> Evaluation:
    """Score every row of `data` by `model`, and let it answer `samples` of them.

    `model`: an open one, or what open_model takes with `opening` (base, quantise, device, ...). `data`: a file,
    settings, or rows of tokens and labels made with the model's tokenizer. `limit`: so many rows, always the same ones.
    Raises SourceError when no row is left.
    """
    answerer = open_model(model, **opening) if isinstance(model, str | Path) else model
    with tempfile.TemporaryDirectory(prefix="mergeforge-eval-") as folder:
        rows = rows_of(data, answerer, Path(folder))
        return score(answerer, rows, limit, batch, samples, sampling, progress)


def score(
    answerer: Answerer,
    rows: Rows,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of rows that are made for this model."""
    chosen = {at: rows.rows[at] for at in rows.chosen(limit)}
    fit = {at: row for at, row in chosen.items() if len(row.tokens) <= answerer.context and counts_anything(row)}
    if not fit:
        raise SourceError(f"none of {len(chosen)} rows can be scored: too long for {answerer.name}, or nothing counts")
    places = list(fit)
    found: dict[int, RowScore] = {}
    scores = answerer.scores(list(fit.values()), batch=batch)
    started = time.monotonic()
    for at, one in scores:
        found[places[at]] = one
        if progress:
            progress(len(found), len(fit))
    seconds = time.monotonic() - started
    results = tuple(
        RowResult(at, rows.keys[at], one.nll, one.tokens, one.correct, nbytes(answerer.tokenizer, fit[at]))
        for at, one in sorted(found.items())
    )
    read = sum(len(row.tokens) for row in fit.values())
    shown = [places[at] for at in spread(len(fit), samples)]
    answered = tuple(sample for at in shown if (sample := _sample(answerer, at, fit[at], sampling)))
    left_out = len(chosen) - len(fit)
    return Evaluation(
        answerer.name, answerer.kind, results, left_out, seconds, read, answered, rows.counts, rows.template
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly spread."""
    return [at * count // limit for at in range(limit)] if limit < count else list(range(count))


def _sample(answerer: Answerer, at: int, row: Row, sampling: Sampling) -> Sample | None:
    """The answer to a row's last question; a text's second half. None where the context has no room for it."""
    start, stop = spans(row)[-1]
    cut = start if start > 1 else max(1, (start + stop) // 2)
    tokens = row.tokens.tolist()
    prompt = decoded(answerer.tokenizer, tokens[:cut], special=True)[-CHARACTERS:]
    expected = decoded(answerer.tokenizer, tokens[cut:stop], special=False)
    try:
        return Sample(at, prompt, expected, answerer.answer(tokens[:cut], sampling))
    except TooLong:
        return None


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def _median(numbers: list[float]) -> float:
    known = sorted(one for one in numbers if not math.isnan(one))
    return known[len(known) // 2] if known else math.nan


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
