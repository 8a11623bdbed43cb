"""How well a model predicts the answers of a data set, and what it answers itself."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.data import DataStats
from mergeforge.errors import SourceError
from mergeforge.eval.backend import Answer, ModelBackend, PromptTooLong, ScoredRow, TokenRow
from mergeforge.eval.dataset import EvalData, EvalRows, has_scored_tokens, make_rows, scored_nbytes, scored_spans
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, Sampling
from mergeforge.eval.stop_strings import decode

Progress = Callable[[int, int], object]  # rows done, rows in total
MAX_PROMPT_CHARS = 2000  # of a sample's prompt that are kept, from its end


@dataclass(frozen=True)
class RowResult:
    """The sums of one row. `row`: its index; `key`: depends on its content, not on the tokenizer.

    `nbytes`: of the scored tokens' text in UTF-8, without special tokens.
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
    """The result over all rows; `seconds` and `read`: time and tokens (prompts included) of scoring."""

    model: str
    kind: str
    rows: tuple[RowResult, ...]
    left_out: int  # rows longer than the model's context, or without scored tokens
    seconds: float
    read: int
    samples: tuple[Sample, ...] = ()
    counts: DataStats | None = None  # what became of the data's rows
    template: str = ""  # where the template of the rows comes from
    warnings: tuple[WarningText, ...] = ()  # what makes the numbers doubtful

    @property
    def tokens(self) -> int:
        """Scored tokens: those of the answers."""
        return sum(row.tokens for row in self.rows)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a scored token, in nats."""
        return _ratio(math.fsum(row.nll for row in self.rows), self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf if self.nll > 0 else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the answers' text; the bits include the tokens that end an answer."""
        return _ratio(math.fsum(row.nll for row in self.rows) / math.log(2), sum(row.nbytes for row in self.rows))

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that are the most likely ones, given the true tokens before them."""
        return _ratio(sum(row.correct for row in self.rows), self.tokens)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(row.nll) for row in self.rows)

    @property
    def speed(self) -> float:
        """Tokens read per second, prompts included."""
        return _ratio(self.read, self.seconds)

    @property
    def answer_speed(self) -> float:
        """Tokens generated per second, the median of the samples; nan without samples."""
        return _median([sample.answer.speed for sample in self.samples])

    @property
    def first_token(self) -> float:
        """Seconds to the first token, the median of the samples; nan without samples."""
        return _median([sample.answer.first for sample in self.samples if sample.answer.tokens])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; anything that is not a number is None."""
        numbers = {name: _finite_or_none(getattr(self, name)) for name in NUMBERS}
        facts = {"model": self.model, "kind": self.kind, "rows": len(self.rows), "left_out": self.left_out} | numbers
        return facts | ({"warnings": list(self.warnings)} if self.warnings else {})


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
    model: str | Path | ModelBackend,
    data: EvalData,
    *,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    progress: Progress | None = None,
    **open_options: Any,
) -> Evaluation:
    """Score every row of `data` with `model`, and let it answer `samples` of them.

    model: an open one, or a path for open_model with `open_options` (base, quantize, device, ...). data: a file,
    settings, or rows of tokens and labels made with the model's tokenizer. limit: score only this many rows, always the
    same ones. Raises SourceError if no row is left.
    """
    backend = open_model(model, **open_options) if isinstance(model, str | Path) else model
    with tempfile.TemporaryDirectory(prefix="mergeforge-eval-") as folder:
        rows = make_rows(data, backend, Path(folder))
        return evaluate_rows(backend, rows, limit, batch, samples, sampling, progress)


def evaluate_rows(
    model: ModelBackend,
    rows: EvalRows,
    limit: int | None = None,
    batch: int | None = None,
    samples: int = 0,
    sampling: Sampling = GREEDY,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of rows that were made for this model."""
    selected = {index: rows.rows[index] for index in rows.select(limit)}
    usable = {
        index: row for index, row in selected.items() if len(row.tokens) <= model.context and has_scored_tokens(row)
    }
    if not usable:
        raise SourceError(
            f"none of {len(selected)} rows can be scored: too long for {model.name}, or without scored tokens"
        )
    scored_rows = model.score_rows(list(usable.values()), batch=batch)  # llama.cpp loads the file here
    started = time.monotonic()
    scores: dict[int, ScoredRow] = {}
    for position, score in scored_rows:
        scores[position] = score
        if progress:
            progress(len(scores), len(usable))
    seconds = time.monotonic() - started
    sampled = [list(usable)[position] for position in evenly_spaced(len(usable), samples)]
    answered = tuple(sample for index in sampled if (sample := _sample(model, index, usable[index], sampling)))
    return Evaluation(
        model=model.name,
        kind=model.kind,
        rows=_row_results(model, rows, usable, scores),
        left_out=len(selected) - len(usable),
        seconds=seconds,
        read=sum(len(row.tokens) for row in usable.values()),
        samples=answered,
        counts=rows.counts,
        template=rows.template,
        warnings=model.warnings,
    )


def _row_results(
    model: ModelBackend, rows: EvalRows, usable: Mapping[int, TokenRow], scores: Mapping[int, ScoredRow]
) -> tuple[RowResult, ...]:
    """`usable`: the rows by index; `scores`: by position among them."""
    return tuple(
        RowResult(
            row=index,
            key=rows.keys[index],
            nll=scores[position].nll,
            tokens=scores[position].tokens,
            correct=scores[position].correct,
            nbytes=scored_nbytes(model.tokenizer, row),
        )
        for position, (index, row) in enumerate(usable.items())
    )


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spaced."""
    return [index * count // limit for index in range(limit)] if limit < count else list(range(count))


def _sample(model: ModelBackend, index: int, row: TokenRow, sampling: Sampling) -> Sample | None:
    """The answer to a row's last question, or the second half of a text. None if the context has no room for it."""
    start, stop = scored_spans(row)[-1]
    cut = start if start > 1 else max(1, (start + stop) // 2)
    tokens = row.tokens.tolist()
    prompt = decode(model.tokenizer, tokens[:cut], special=True)[-MAX_PROMPT_CHARS:]
    expected = decode(model.tokenizer, tokens[cut:stop], special=False)
    try:
        return Sample(index, prompt, expected, model.generate(tokens[:cut], sampling))
    except PromptTooLong:
        return None


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _median(numbers: list[float]) -> float:
    known = sorted(number for number in numbers if not math.isnan(number))
    return known[len(known) // 2] if known else math.nan


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
