"""Rows rendered in batches: the tokenizer gets the texts of many rows in one call, which it divides among the cores.

A thread tokenizes one batch while the next is rendered by Jinja. The results are those of `Renderer.render`, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mergeforge.data.conversation import EmptyRecord, InvalidRecord
from mergeforge.data.render import Renderer, RenderResult
from mergeforge.data.source_reader import ParsedRecord
from mergeforge.data.tokenizers import Finished, TokenizedText, Tokenizing, next_texts, tokenize

BATCH_CHARS = 1 << 16  # in one call of the tokenizer; its results take about 100 bytes a token

Result = RenderResult | InvalidRecord | EmptyRecord


@dataclass
class _Row:
    """A row, its rendering, and how far that is: the texts that it needs tokenized, or its result."""

    record: ParsedRecord
    work: Tokenizing[RenderResult]
    texts: Sequence[str] = ()
    result: Result | None = None

    def advance(self, tokens: list[TokenizedText] | None = None) -> int:
        """Go on until texts are needed; returns their characters."""
        self.texts = ()
        try:
            step = next_texts(self.work, tokens)
        except (InvalidRecord, EmptyRecord) as error:
            self.result = error
            return 0
        if isinstance(step, Finished):
            self.result = step.result
            return 0
        self.texts = step
        return sum(len(text) for text in step)


def render_rows(
    records: Iterable[ParsedRecord], renderer: Renderer, batch_chars: int = BATCH_CHARS
) -> Iterator[tuple[ParsedRecord, Result]]:
    """Each row with its examples, or with the reason why it cannot be used. Raises SourceError as `render` does."""
    with ThreadPoolExecutor(1) as pool:
        tokenizing = _Tokenizer(pool, renderer)
        started: deque[tuple[list[_Row], Future[list[TokenizedText]]]] = deque()
        for batch in _batches(records, renderer, batch_chars):
            started.append((batch, tokenizing.start(batch)))
            if len(started) > 1 or batch_chars <= 1:
                yield from _finish(*started.popleft(), tokenizing)
        for rows, future in started:
            yield from _finish(rows, future, tokenizing)


@dataclass(frozen=True)
class _Tokenizer:
    """The one thread that calls the tokenizer."""

    pool: ThreadPoolExecutor
    renderer: Renderer

    def start(self, rows: Sequence[_Row]) -> Future[list[TokenizedText]]:
        """Tokenize the texts of all rows."""
        return self.pool.submit(tokenize, self.renderer.tokenizer, [text for row in rows for text in row.texts])


def _batches(records: Iterable[ParsedRecord], renderer: Renderer, batch_chars: int) -> Iterator[list[_Row]]:
    batch, characters = [], 0
    for record in records:
        row = _Row(record, renderer.rendering(record.content))
        characters += row.advance()
        batch.append(row)
        if characters >= batch_chars or batch_chars <= 1:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finish(
    rows: list[_Row], future: Future[list[TokenizedText]], tokenizing: _Tokenizer
) -> Iterator[tuple[ParsedRecord, Result]]:
    """Send the tokens, and tokenize again for the few rows that need more."""
    pending = [row for row in rows if row.texts]
    while pending:
        tokens = iter(future.result())
        for row in pending:
            row.advance([next(tokens) for _ in row.texts])
        pending = [row for row in pending if row.texts]
        if pending:
            future = tokenizing.start(pending)
    for row in rows:
        assert row.result is not None
        yield row.record, row.result
