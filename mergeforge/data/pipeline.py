"""The rows of all sources through a renderer into a token store, with a record of what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mergeforge.core.messages import WarningText
from mergeforge.data.conversation import Conversation, EmptyRecord, InvalidRecord, TextSample
from mergeforge.data.counts import MAX_SKIPPED, SKIP_KINDS, DataStats, RecordCounter, total_stats
from mergeforge.data.formats import Format
from mergeforge.data.loss_mask import SPLIT_ANSWERS
from mergeforge.data.preference import PreferenceSample
from mergeforge.data.render import Renderer, RenderResult
from mergeforge.data.render_batches import BATCH_CHARS, render_rows
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.source_reader import OpenFile, open_files, parse_file
from mergeforge.data.token_store import TokenStoreWriter
from mergeforge.errors import SourceError

HELD_OUT = "validation: "  # prefix of the name of a source that is not trained on
_MIN_USED = 0.01  # share of the rows; if fewer are usable, something is wrong with all of them

PROGRESS_ROWS = 100  # between two calls of OnProgress
OnProgress = Callable[[int], None]  # called with the number of rows so far


@dataclass(frozen=True)
class RenderedRecord:
    """A row that has become one or more examples."""

    place: str
    content: Conversation | TextSample | PreferenceSample
    rendered: RenderResult
    weight: float = 1.0


def render_file(
    file: OpenFile, renderer: Renderer, counter: RecordCounter, system: str | None, *, batch_chars: int = BATCH_CHARS
) -> Iterator[RenderedRecord]:
    """The rows of a file that can be trained on; the others are counted as skipped. batch_chars: see render_rows."""
    for row, result in render_rows(parse_file(file, counter, system), renderer, batch_chars):
        if isinstance(result, InvalidRecord):
            counter.skip(row.place, "bad", str(result))
        elif isinstance(result, EmptyRecord):
            counter.skip(row.place, "empty", str(result))
        elif result.examples:
            yield RenderedRecord(row.place, row.content, result, row.weight)
        else:
            counter.skip(row.place, "too_long", f"more than {renderer.seq_len} tokens")


@dataclass(frozen=True)
class _StoredSource:
    """A source in the store: its examples [start, stop) and its trained tokens."""

    name: str
    counter: RecordCounter
    start: int
    stop: int
    trained: int


class TokenizePipeline:
    """Adds sources to a store, one after the other."""

    def __init__(
        self, settings: DataSettings, renderer: Renderer, writer: TokenStoreWriter, on_progress: OnProgress
    ) -> None:
        self.formats: list[tuple[str, str, Format]] = []
        self.conversations = 0
        self._omitted: Counter[str] = Counter()
        self._weights: set[float] = set()
        self._split_rows = self._previous_rows = 0
        self._settings, self._renderer, self._writer, self._on_progress = settings, renderer, writer, on_progress
        self._sources: list[_StoredSource] = []

    def add(self, source: DataSource, name: str) -> None:
        """Add a source. Raises SourceError if almost none of it can be trained on."""
        start, trained, counter = self._writer.count, self._writer.trained, RecordCounter()
        for file in open_files(source):
            self.formats.append((name, file.file.name, file.format))
            for row in render_file(file, self._renderer, counter, self._settings.system):
                self._add_row(row, counter)
        _check_used(name, counter)
        self._previous_rows += counter.rows
        self._sources.append(_StoredSource(name, counter, start, self._writer.count, self._writer.trained - trained))

    def _add_row(self, row: RenderedRecord, counter: RecordCounter) -> None:
        self.conversations += not isinstance(row.content, TextSample)
        self._split_rows += SPLIT_ANSWERS in row.rendered.strategy
        self._omitted.update(row.rendered.omitted)
        counter.kinds["used"] += 1
        counter.kinds["cut"] += row.rendered.cut
        self._weights = {min(self._weights | {row.weight}), max(self._weights | {row.weight})}
        key = row.content.key(self._settings.seed)
        for example in row.rendered.examples:
            self._writer.add(replace(example, weight=row.weight), key)
        if counter.kinds["used"] % PROGRESS_ROWS == 0:
            self._on_progress(self._previous_rows + counter.rows)

    def counts(self) -> DataStats:
        """All statistics, once the store is closed; the totals leave out held-out sources."""
        lengths, keys = self._writer.lengths(), self._writer.keys()
        by_name: dict[str, DataStats] = {}
        for source in self._sources:
            name = source.name
            while name in by_name:
                name += " (again)"
            rows = slice(source.start, source.stop)
            by_name[name] = source.counter.stats(lengths[rows], source.trained, keys[rows])
        train = {name: stats for name, stats in by_name.items() if not name.startswith(HELD_OUT)}
        stop = sum(stats.examples for stats in train.values())
        return replace(total_stats(train, lengths[:stop], keys[:stop]), sources=by_name)

    def notes(self) -> Iterator[str]:
        """Facts about the data that the user should know."""
        if self._split_rows:
            rows = f"{self._split_rows} row{'s' if self._split_rows > 1 else ''}"
            yield f"the template renders earlier answers differently: in {rows} each answer is an example of its own"
        if len(self._weights) > 1:
            yield f"rows count {min(self._weights):g} to {max(self._weights):g} times in the loss, by their weights"
        for what, count in self._omitted.items():
            rows = f"{count} row{'s' if count > 1 else ''}"
            yield WarningText(f"the template leaves out {what}, which {rows} have: name a template that renders them")
        if self.conversations:
            yield from self._renderer.notes()


def _check_used(name: str, counter: RecordCounter) -> None:
    rows, used = counter.rows, counter.kinds["used"]
    if used > _MIN_USED * rows:
        return
    skipped = [kind for kind in SKIP_KINDS if counter.kinds[kind]]
    why = ", ".join(f"{counter.kinds[kind]} {kind.replace('_', ' ')}" for kind in skipped)
    lines = "\n".join(f"  {row.place}: {row.text}" for row in counter.skipped[:MAX_SKIPPED])
    hint = "`mergeforge data preview` shows how the rows are read"
    if counter.kinds["too_long"] > rows / 2:
        hint = "use a larger seq_len, or too_long: cut_prompt"
    raise SourceError(f"only {used} of {rows} rows of {name} can be trained on ({why}):\n{lines}", hint=hint)
