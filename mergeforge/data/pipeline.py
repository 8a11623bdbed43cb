"""Filling: the rows of all sources through a renderer into a store, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mergeforge.data.conversation import BadRow, Conversation, EmptyRow, Passage
from mergeforge.data.counts import KINDS, Counts, Tally, total_of
from mergeforge.data.formats import Format
from mergeforge.data.loss_mask import APART
from mergeforge.data.render import Rendered, Renderer
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.source_reader import OpenFile, open_files, read_file
from mergeforge.data.token_store import StoreWriter
from mergeforge.errors import SourceError

HELD_OUT = "validation: "  # before the name of a source that is not trained on
_FEWEST = 0.01  # of the rows; with less left something is wrong with all of them

Watch = Callable[[int], None]  # called with the rows so far


@dataclass(frozen=True)
class RenderedRow:
    """A row that has become one example or more."""

    place: str
    content: Conversation | Passage
    rendered: Rendered


def rendered_rows(file: OpenFile, renderer: Renderer, tally: Tally, system: str | None) -> Iterator[RenderedRow]:
    """The rows of a file that can be trained on; the others are counted."""
    for row in read_file(file, tally, system):
        try:
            found = renderer.render(row.content)
        except BadRow as error:
            tally.skip(row.place, "bad", str(error))
        except EmptyRow as error:
            tally.skip(row.place, "empty", str(error))
        else:
            if found.examples:
                yield RenderedRow(row.place, row.content, found)
            else:
                tally.skip(row.place, "too_long", f"more than {renderer.seq_len} tokens")


class Filling:
    """Adds sources to a store one after the other."""

    def __init__(self, settings: DataSettings, renderer: Renderer, writer: StoreWriter, watch: Watch) -> None:
        self.formats: list[tuple[str, str, Format]] = []
        self.conversations = 0
        self._apart = self._before = 0
        self._settings, self._renderer, self._writer, self._watch = settings, renderer, writer, watch
        self._parts: list[tuple[str, Tally, int, int, int]] = []  # name, tally, examples [start, stop), trained tokens

    def add(self, source: DataSource, name: str) -> None:
        """Add a source. Raises SourceError where next to nothing of it can be trained on."""
        start, trained, tally = self._writer.count, self._writer.trained, Tally()
        for file in open_files(source):
            self.formats.append((name, file.file.name, file.format))
            for row in rendered_rows(file, self._renderer, tally, self._settings.system):
                self._add(row, tally)
        _check_enough(name, tally)
        self._before += tally.rows
        self._parts.append((name, tally, start, self._writer.count, self._writer.trained - trained))

    def _add(self, row: RenderedRow, tally: Tally) -> None:
        self.conversations += isinstance(row.content, Conversation)
        self._apart += APART in row.rendered.way
        tally.kinds["used"] += 1
        tally.kinds["cut"] += row.rendered.cut
        key = row.content.key(self._settings.seed)
        for one in row.rendered.examples:
            self._writer.add(one, key)
        self._watch(self._before + tally.rows)

    def counts(self) -> Counts:
        """All counts, once the store is closed; the totals are of what is not held out."""
        lengths, keys = self._writer.lengths(), self._writer.keys()
        parts: dict[str, Counts] = {}
        for name, tally, start, stop, trained in self._parts:
            while name in parts:
                name += " (again)"
            parts[name] = tally.counts(lengths[start:stop], trained, keys[start:stop])
        own = {name: one for name, one in parts.items() if not name.startswith(HELD_OUT)}
        stop = sum(one.examples for one in own.values())
        return replace(total_of(own, lengths[:stop], keys[:stop]), sources=parts)

    def notes(self) -> Iterator[str]:
        """What a person should know."""
        if self._apart:
            rows = f"{self._apart} row{'s' if self._apart > 1 else ''}"
            yield f"the template renders earlier answers otherwise: in {rows} each answer became an example of its own"
        if self.conversations:
            yield from self._renderer.notes()


def _check_enough(name: str, tally: Tally) -> None:
    rows, used = tally.rows, tally.kinds["used"]
    if used > _FEWEST * rows:
        return
    why = ", ".join(f"{tally.kinds[kind]} {kind.replace('_', ' ')}" for kind in KINDS if tally.kinds[kind])
    lines = "\n".join(f"  {one.place}: {one.why}" for one in tally.skipped[:8])
    hint = "mergeforge data preview shows how rows are read"
    if tally.kinds["too_long"] > rows / 2:
        hint = "a larger seq_len, or too_long: cut_prompt"
    raise SourceError(f"of {rows} rows of {name}, {used} can be trained on ({why}):\n{lines}", hint=hint)
