"""Showing: how sources are read and what their first rows become, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import Conversation, Passage
from mergeforge.data.counts import Skipped, Tally
from mergeforge.data.formats import Format
from mergeforge.data.pipeline import rendered_rows
from mergeforge.data.preview_spans import Run, marked, runs
from mergeforge.data.render import Example, Renderer, make_renderer
from mergeforge.data.settings import DataSettings
from mergeforge.data.source_reader import Decision, OpenFile, decisions, open_files, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShownRow:
    """A row, and its examples where there is a tokenizer. `way`: how the answers were found."""

    place: str
    content: Conversation | Passage
    examples: tuple[Example, ...] = ()
    way: str = ""

    def lines(self) -> list[str]:
        """What the row says, as plain text."""
        if isinstance(self.content, Passage):
            return [self.content.text]
        return [f"{message['role']}: {message['content']}" for message in self.content.messages]


@dataclass(frozen=True)
class Shown:
    """What a preview shows. `template`: where the chat template is from ("": none is needed)."""

    decisions: tuple[Decision, ...]
    rows: tuple[ShownRow, ...]
    skipped: tuple[Skipped, ...]
    template: str
    notes: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None

    def runs(self, example: Example) -> list[Run]:
        assert self.tokenizer is not None
        return list(runs(example, self.tokenizer))

    def marked(self, example: Example) -> str:
        assert self.tokenizer is not None
        return marked(example, self.tokenizer)

    def spelling(self, token: int) -> str:
        """One token, so that white space in it is seen."""
        assert self.tokenizer is not None
        return repr(self.tokenizer.decode([token]))

    def json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "decisions": [asdict(one) for one in self.decisions],
            "template": self.template,
            "notes": list(self.notes),
            "rows": [self._row(row) for row in self.rows],
            "skipped": [asdict(one) for one in self.skipped],
        }

    def _row(self, row: ShownRow) -> dict[str, Any]:
        content = row.content
        what = {"text": content.text} if isinstance(content, Passage) else {"messages": list(content.messages)}
        examples = [
            {"tokens": one.tokens.tolist(), "labels": one.labels.tolist(), "text": marked(one, self.tokenizer)}
            for one in row.examples
            if self.tokenizer is not None
        ]
        return {"place": row.place, **what, "way": row.way, "examples": examples}


def show(settings: DataSettings, count: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Shown:
    """The first `count` rows of each source that can be used, and what was left out before them.

    Raises SourceError and RecipeError as reading does.
    """
    renderer = make_renderer(settings, tokenizer) if tokenizer is not None else None
    opened: list[tuple[str, str, Format]] = []
    rows: list[ShownRow] = []
    tally = Tally()
    for source in settings.sources:
        left = count
        for file in open_files(source):
            opened.append((source.path, file.file.name, file.format))
            found = list(islice(_rows(file, renderer, settings.system, tally), left))
            left -= len(found)
            rows += found
    conversations = any(isinstance(row.content, Conversation) for row in rows)
    used = renderer if conversations else None
    template, notes = (used.template.name, tuple(used.notes())) if used is not None else ("", ())
    return Shown(decisions(opened), tuple(rows), tuple(tally.skipped), template, notes, tokenizer)


def _rows(file: OpenFile, renderer: Renderer | None, system: str | None, tally: Tally) -> Iterator[ShownRow]:
    if renderer is None:
        yield from (ShownRow(row.place, row.content) for row in read_file(file, tally, system))
        return
    for row in rendered_rows(file, renderer, tally, system):
        yield ShownRow(row.place, row.content, row.rendered.examples, row.rendered.way)
