"""Rendering: a conversation or text -> token ids and labels, cut to a length where it must be.

Labels are not shifted: label i belongs to token i, and -100 is not trained on. The first token's label is always -100
(nothing comes before it), so examples can be laid end to end without one predicting the next one's start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.data.chat_templates import Template, TemplateRefusal, choose_template
from mergeforge.data.conversation import BadRow, Conversation, EmptyRow, Passage, conversation
from mergeforge.data.loss_mask import Masked, Masker
from mergeforge.data.settings import DataSettings
from mergeforge.data.template_probe import ending, fitted, template_notes
from mergeforge.data.tokenizers import added_first, tokenize
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

UNTRAINED = -100


@dataclass(frozen=True)
class Example:
    """Token ids and labels, int32; label i belongs to token i, -100 is not trained on."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return int((self.labels != UNTRAINED).sum())


@dataclass(frozen=True)
class Rendered:
    """What one row became. `cut`: how many of the examples were cut; `too_long`: how many were dropped for it."""

    examples: tuple[Example, ...]
    cut: int = 0
    too_long: int = 0
    way: str = ""


@dataclass(frozen=True)
class Renderer:
    """Makes examples with one tokenizer and template."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    masker: Masker
    loss_on: str
    seq_len: int | None
    too_long: str
    first: tuple[int, ...]  # what the tokenizer puts before any text: BOS, or nothing
    problem: SourceError | None = None  # why there is no template; texts need none

    def render(self, row: Conversation | Passage) -> Rendered:
        """The examples of a row: one, or several of a long text or where each answer stands alone.

        Raises BadRow and EmptyRow; SourceError for a conversation where there is no template that serves.
        """
        if isinstance(row, Passage):
            return self._passage(row)
        if self.problem is not None:
            raise self.problem
        kept = cut = 0
        examples, ways = [], set()
        masks = list(self._masked(row))
        for masked in masks:
            ids, labels = self._labelled(masked)
            if labels.count(UNTRAINED) == len(labels):
                raise EmptyRow("nothing in it is trained on")
            found = self._fitted(ids, labels, masked)
            if found is not None:
                kept += 1
                cut += len(found) < len(ids)
                examples.append(found)
            ways.add(masked.way)
        return Rendered(tuple(examples), cut, len(masks) - kept, ", ".join(sorted(ways)))

    def notes(self) -> list[str]:
        """What a person should know of the template together with this tokenizer."""
        notes = template_notes(self.template, self.tokenizer)
        if not self.masker.ending.ids and self.loss_on != "all":
            notes.append("the template ends an answer with no special token: EOS follows the last one of each row")
        return notes

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of messages, ready for the assistant's next one. Raises SourceError where the template refuses."""
        if self.problem is not None:
            raise self.problem
        try:
            text = self.template.text(self.tokenizer, messages, tools, prompt=True)
        except TemplateRefusal as error:
            raise SourceError(str(error)) from None
        return tokenize(self.tokenizer, [text])[0].ids

    def _masked(self, row: Conversation) -> Iterator[Masked]:
        row = row if self.loss_on == "all" else _to_last_answer(row)
        wanted = _wanted(row, self.loss_on)
        if self.loss_on != "all":
            if not wanted:
                raise EmptyRow("no answer to train on")
            yield from self.masker.masks(row, wanted)
            return
        left_out = [at for at, train in enumerate(row.trained) if train is False]
        if not left_out:
            ids = self.masker.rendered(row)
            yield Masked(ids, ((0, len(ids)),), "everything")
            return
        (found,) = self.masker.masks(row, left_out, apart=False)
        yield Masked(found.ids, tuple(_between(found)), "everything but what says train: false")

    def _labelled(self, masked: Masked) -> tuple[list[int], list[int]]:
        """(ids, labels), with EOS after a last answer that the template ends with no special token."""
        ids, labels = list(masked.ids), [UNTRAINED] * len(masked.ids)
        for start, stop in masked.spans:
            labels[start:stop] = ids[start:stop]
        last, eos = max((stop for _, stop in masked.spans), default=0), self.tokenizer.eos_token_id
        if eos is not None and self._lacks_eos(ids, last):
            ids, labels = [*ids[:last], eos], [*labels[:last], eos]
        return ids, [UNTRAINED, *labels[1:]]

    def _lacks_eos(self, ids: list[int], last: int) -> bool:
        """Whether what is trained on ends before `last` with no special token, and nothing is said after it."""
        if self.masker.ending.ids or not last or ids[last - 1] == self.tokenizer.eos_token_id:
            return False
        return not str(self.tokenizer.decode(ids[last:])).strip()

    def _fitted(self, ids: list[int], labels: list[int], masked: Masked) -> Example | None:
        """The example in seq_len tokens, or None where it is too long or nothing of it would be trained on."""
        longest = self.seq_len
        if longest is None or len(ids) <= longest:
            return _example(ids, labels)
        if self.too_long == "drop":
            return None
        if self.too_long == "cut_prompt":
            return self._cut_prompt(ids, labels, masked, longest)
        cut = labels[:longest]
        return _example(ids[:longest], cut) if any(label != UNTRAINED for label in cut) else None

    def _cut_prompt(self, ids: list[int], labels: list[int], masked: Masked, longest: int) -> Example | None:
        """Without the oldest tokens after BOS. The last answer stays whole, with one token at least before it."""
        kept = len(self.first) if tuple(ids[: len(self.first)]) == self.first else 0
        start = len(ids) - (longest - kept)
        last = masked.spans[-1][0]
        if self.loss_on != "all" and start > last - (not kept):
            return None
        begun = next((stop for begin, stop in masked.spans if begin < start < stop), start)
        if self.loss_on != "all":  # half of an earlier answer has lost what it answers
            labels = [UNTRAINED if start <= at < begun else label for at, label in enumerate(labels)]
        labels = [*labels[:kept], *labels[start:]]
        labels[0] = UNTRAINED
        return _example([*ids[:kept], *ids[start:]], labels)

    def _passage(self, row: Passage) -> Rendered:
        """BOS where the tokenizer puts it, the text, EOS; in pieces of seq_len."""
        ids = [*self.first, *tokenize(self.tokenizer, [row.text])[0].ids]
        eos = self.tokenizer.eos_token_id
        ids += [eos] if eos is not None and ids[-1] != eos else []
        longest = self.seq_len or len(ids)
        starts = range(0, len(ids), longest) if self.too_long != "cut_end" else (0,)
        pieces = [ids[start : start + longest] for start in starts]
        pieces = [piece for piece in pieces if len(piece) > 1]  # of one token, nothing is predicted
        if not pieces:
            raise EmptyRow("a text of one token")
        examples = tuple(_example(piece, [UNTRAINED, *piece[1:]]) for piece in pieces)
        return Rendered(examples, int(len(ids) > longest), 0, "text")


def make_renderer(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer that the settings ask for. Raises RecipeError for a template that there is not."""
    problem = None
    try:
        template = fitted(choose_template(settings.template, tokenizer), tokenizer)
    except SourceError as error:
        template, problem = Template("", "none"), error
    masker = Masker(tokenizer, template, ending(template, tokenizer))
    first = tuple(added_first(tokenizer))
    return Renderer(tokenizer, template, masker, settings.loss_on, settings.seq_len, settings.too_long, first, problem)


def example(
    messages: Sequence[Mapping[str, Any]] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    system: str | None = None,
    loss_on: str = "assistant",
) -> Example:
    """One conversation (or text), rendered and masked. Raises SourceError where that cannot be done exactly."""
    renderer = make_renderer(DataSettings((), template=template, loss_on=loss_on), tokenizer)
    try:
        row = Passage(messages) if isinstance(messages, str) else conversation(messages, system=system)
        found = renderer.render(row).examples
    except (BadRow, EmptyRow) as error:
        raise SourceError(f"this conversation cannot be trained on: {error}") from None
    return found[-1]


def _to_last_answer(row: Conversation) -> Conversation:
    """Without what follows the last message that could be trained on."""
    stop = max((at + 1 for at in range(len(row.messages)) if _trainable(row, at)), default=0)
    return Conversation(row.messages[:stop], row.trained[:stop], row.tools)


def _trainable(row: Conversation, at: int) -> bool:
    return row.messages[at]["role"] == "assistant" or row.trained[at] is True


def _wanted(row: Conversation, loss_on: str) -> list[int]:
    """The messages that are trained on."""
    if loss_on == "last":
        last = len(row.messages) - 1
        return [] if last < 0 or row.trained[last] is False else [last]
    said = [row.trained[at] for at in range(len(row.messages))]
    answers = [one["role"] == "assistant" for one in row.messages]
    return [
        at for at, (says, answer) in enumerate(zip(said, answers, strict=True)) if says or (says is None and answer)
    ]


def _between(masked: Masked) -> Iterator[tuple[int, int]]:
    """What lies outside the spans."""
    here = 0
    for start, stop in (*masked.spans, (len(masked.ids), len(masked.ids))):
        if start > here:
            yield here, start
        here = stop


def _example(ids: Sequence[int], labels: Sequence[int]) -> Example:
    import numpy as np

    return Example(np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
