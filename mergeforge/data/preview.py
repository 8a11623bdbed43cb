"""A preview for people: how sources are read, and what their first rows become, with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import Conversation, TextSample
from mergeforge.data.counts import RecordCounter, Skipped
from mergeforge.data.formats import Format
from mergeforge.data.pipeline import render_file
from mergeforge.data.preference import PreferenceSample, RatedAnswer
from mergeforge.data.render import IGNORE_INDEX, Example, Renderer, make_renderer
from mergeforge.data.settings import DataSettings
from mergeforge.data.source_reader import Decision, OpenFile, merge_decisions, open_files, parse_file
from mergeforge.data.tokenizers import load_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class TokenSpan:
    """The text of adjacent tokens, special ones included, and whether they are trained on."""

    text: str
    trained: bool


def token_spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenSpan]:
    """The example from its first to its last token, as spans that are trained on or not."""
    ids, before, stop = example.tokens.tolist(), "", 0
    for trained, group in groupby(label != IGNORE_INDEX for label in example.labels.tolist()):
        stop += len(list(group))
        text = str(tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield TokenSpan(text[len(before) :], trained)  # decoders strip a leading space, so no span is decoded alone
        before = text


def mark_trained(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as plain text, with what is trained on between ⟦ and ⟧."""
    spans = token_spans(example, tokenizer)
    return "".join(f"{OPEN}{span.text}{CLOSE}" if span.trained else span.text for span in spans)


@dataclass(frozen=True)
class PreviewRecord:
    """A row, and its examples if there is a tokenizer. `strategy`: how the answers were found."""

    place: str
    content: Conversation | TextSample | PreferenceSample
    examples: tuple[Example, ...] = ()
    strategy: str = ""

    def lines(self) -> list[str]:
        """The row as plain text."""
        if isinstance(self.content, TextSample):
            return [self.content.text]
        if isinstance(self.content, PreferenceSample):
            return [line for answer in self.content.answers for line in _answer_lines(answer)]
        return _message_lines(self.content)


def _message_lines(conversation: Conversation) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in conversation.messages]


def _answer_lines(answer: RatedAnswer) -> list[str]:
    return ["preferred:" if answer.preferred else "rejected:", *_message_lines(answer.conversation)]


@dataclass(frozen=True)
class Preview:
    """What a preview shows. `template`: where the chat template comes from ("": none is needed)."""

    decisions: tuple[Decision, ...]
    rows: tuple[PreviewRecord, ...]
    skipped: tuple[Skipped, ...]
    template: str
    notes: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None

    def token_spans(self, example: Example) -> list[TokenSpan]:
        assert self.tokenizer is not None
        return list(token_spans(example, self.tokenizer))

    def mark_trained(self, example: Example) -> str:
        assert self.tokenizer is not None
        return mark_trained(example, self.tokenizer)

    def token_repr(self, token: int) -> str:
        """One token, quoted so that white space is visible."""
        assert self.tokenizer is not None
        return repr(self.tokenizer.decode([token]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "decisions": [asdict(decision) for decision in self.decisions],
            "template": self.template,
            "notes": list(self.notes),
            "rows": [self._row_as_dict(row) for row in self.rows],
            "skipped": [asdict(row) for row in self.skipped],
        }

    def _row_as_dict(self, row: PreviewRecord) -> dict[str, Any]:
        content = row.content
        fields: dict[str, Any] = {}
        if isinstance(content, PreferenceSample):
            fields["answers"] = [
                {"messages": list(answer.conversation.messages), "preferred": answer.preferred}
                for answer in content.answers
            ]
        elif isinstance(content, TextSample):
            fields["text"] = content.text
        else:
            fields["messages"] = list(content.messages)
        examples = [
            {
                "tokens": example.tokens.tolist(),
                "labels": example.labels.tolist(),
                "text": mark_trained(example, self.tokenizer),
            }
            for example in row.examples
            if self.tokenizer is not None
        ]
        return {"place": row.place, **fields, "way": row.strategy, "examples": examples}


def make_preview(settings: DataSettings, count: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Preview:
    """The first `count` usable rows of each source, and the rows skipped before them.

    Raises SourceError and RecipeError as reading does.
    """
    renderer = make_renderer(settings, tokenizer) if tokenizer is not None else None
    formats: list[tuple[str, str, Format]] = []
    rows: list[PreviewRecord] = []
    counter = RecordCounter()
    for source in settings.sources:
        remaining = count
        for file in open_files(source):
            formats.append((source.path, file.file.name, file.format))
            first_rows = list(islice(_preview_records(file, renderer, settings.system, counter), remaining))
            remaining -= len(first_rows)
            rows += first_rows
    template, notes = "", tuple[str, ...]()
    if renderer is not None and any(not isinstance(row.content, TextSample) for row in rows):
        template, notes = renderer.template.name, (*load_warnings(renderer.tokenizer), *renderer.notes())
    return Preview(merge_decisions(formats), tuple(rows), tuple(counter.skipped), template, notes, tokenizer)


def _preview_records(
    file: OpenFile, renderer: Renderer | None, system: str | None, counter: RecordCounter
) -> Iterator[PreviewRecord]:
    if renderer is None:
        yield from (PreviewRecord(row.place, row.content) for row in parse_file(file, counter, system))
        return
    for row in render_file(file, renderer, counter, system, batch_chars=1):
        yield PreviewRecord(row.place, row.content, row.rendered.examples, row.rendered.strategy)
