"""Rendering: a conversation or text becomes token ids and labels, cut to the maximum length if necessary.

Labels are not shifted: label i belongs to token i, and -100 is not trained on. The label of the first token is always
-100 (nothing precedes it), so examples can be concatenated without one predicting the start of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.data.chat_templates import Template, TemplateError, choose_template
from mergeforge.data.conversation import Conversation, EmptyRecord, InvalidRecord, TextSample, parse_conversation
from mergeforge.data.loss_mask import LossMasker, MaskedTokens
from mergeforge.data.omissions import needs_check, omitted_fields, refuse_omissions
from mergeforge.data.preference import PreferenceSample
from mergeforge.data.settings import DataSettings
from mergeforge.data.template_probe import adapt_template, template_notes, turn_ending
from mergeforge.data.tokenizers import Tokenizing, prefix_ids, run_tokenizing, special_ids, splitting_tokens, tokenize
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross_entropy skips this label


@dataclass(frozen=True)
class Example:
    """Token ids and labels, int32; label i belongs to token i, -100 is not trained on.

    `preference`: 1 for a preferred answer, -1 for a rejected one, 0 where there is no preference. `weight`: how much
    its tokens count in the loss.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    preference: int = 0
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that are trained on."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class RenderResult:
    """What one row became. `cut`: examples that were cut; `too_long`: examples dropped for their length.

    `omitted`: what the template leaves out of the row (omissions.py).
    """

    examples: tuple[Example, ...]
    cut: int = 0
    too_long: int = 0
    strategy: str = ""
    omitted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Renderer:
    """Makes examples with one tokenizer and template."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    masker: LossMasker
    loss_on: str
    seq_len: int | None
    too_long: str
    prefix: tuple[int, ...]  # what the tokenizer puts before any text: BOS, or nothing
    problem: SourceError | None = None  # why there is no template; texts need none

    def render(self, row: Conversation | TextSample | PreferenceSample) -> RenderResult:
        """The examples of a row: one, or several for a long text or one per answer.

        A pair of answers becomes two examples, or none if one of them is too long.

        Raises InvalidRecord and EmptyRecord; SourceError for a conversation if there is no usable template.
        """
        return run_tokenizing(self.tokenizer, self.rendering(row))

    def rendering(self, row: Conversation | TextSample | PreferenceSample) -> Tokenizing[RenderResult]:
        """`render` as a computation whose texts can be tokenized together with those of other rows."""
        if isinstance(row, TextSample):
            return (yield from self._render_text(row))
        if isinstance(row, PreferenceSample):
            return (yield from self._render_answers(row))
        if self.problem is not None:
            raise self.problem
        cut = 0
        examples, strategies = [], set()
        masks = yield from self._masks(row)
        omitted = self._check_omissions(row, masks) if needs_check(row) else ()
        for masked in masks:
            ids, labels = self._ids_and_labels(masked)
            if labels.count(IGNORE_INDEX) == len(labels):
                raise EmptyRecord("nothing in it is trained on")
            example = self._fit(ids, labels, masked)
            if example is not None:
                cut += len(example) < len(ids)
                examples.append(example)
            strategies.add(masked.strategy)
        strategy = ", ".join(sorted(strategies))
        return RenderResult(tuple(examples), cut, len(masks) - len(examples), strategy, omitted)

    def _render_answers(self, row: PreferenceSample) -> Tokenizing[RenderResult]:
        rendered: list[RenderResult] = []
        for answer in row.answers:
            rendered.append((yield from self.rendering(answer.conversation)))
        if any(result.too_long for result in rendered):
            return RenderResult((), too_long=1)
        if any(len(result.examples) != 1 for result in rendered):
            raise InvalidRecord("the template renders the answer in several turns differently: use one answer per row")
        examples = [
            replace(result.examples[0], preference=1 if answer.preferred else -1)
            for result, answer in zip(rendered, row.answers, strict=True)
        ]
        cut = sum(result.cut for result in rendered)
        omitted = tuple(dict.fromkeys(what for result in rendered for what in result.omitted))
        return RenderResult(tuple(examples), cut, 0, rendered[0].strategy, omitted)

    def notes(self) -> list[str]:
        """Facts about the template with this tokenizer that the user should know."""
        notes = template_notes(self.template, self.tokenizer)
        if not self.masker.ending.ids and self.loss_on != "all":
            notes.append(
                "the template ends answers without a special token: EOS is added after the last answer of each row"
            )
        return notes

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of messages with the generation prompt. Raises SourceError if the template refuses them."""
        if self.problem is not None:
            raise self.problem
        try:
            text = self.template.text(self.tokenizer, messages, tools, prompt=True)
        except TemplateError as error:
            raise SourceError(str(error)) from None
        return tokenize(self.tokenizer, [text])[0].ids

    def _check_omissions(self, row: Conversation, masks: Sequence[MaskedTokens]) -> tuple[str, ...]:
        """What the template leaves out; raises InvalidRecord if that makes the row useless."""
        row = row if self.loss_on == "all" else _through_last_answer(row)
        trained = _trained_messages(row, self.loss_on)
        special = special_ids(self.tokenizer)
        texts = []
        for masked in masks:
            for start, stop in masked.spans:
                ids = masked.ids[start:stop]
                texts.append(str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
                if not str(self.tokenizer.decode([token for token in ids if token not in special])).strip():
                    raise InvalidRecord(f"the chat template ({self.template.name}) renders nothing of an answer")
        refuse_omissions(row, trained, "\n".join(texts), self.template, self.tokenizer)
        return tuple(omitted_fields(row, self.template, self.tokenizer))

    def _masks(self, row: Conversation) -> Tokenizing[list[MaskedTokens]]:
        row = row if self.loss_on == "all" else _through_last_answer(row)
        indices = _trained_messages(row, self.loss_on)
        if self.loss_on != "all":
            if not indices:
                raise EmptyRecord("no answer to train on")
            return (yield from self.masker.masks(row, indices))
        excluded = [index for index, train in enumerate(row.train_flags) if train is False]
        if not excluded:
            ids = yield from self.masker.rendered(row)
            return [MaskedTokens(ids, ((0, len(ids)),), "everything")]
        (masked,) = yield from self.masker.masks(row, excluded, split_answers=False)
        return [MaskedTokens(masked.ids, tuple(_gaps(masked)), "everything except messages with train: false")]

    def _ids_and_labels(self, masked: MaskedTokens) -> tuple[list[int], list[int]]:
        """(ids, labels), with EOS after a last answer that the template ends without a special token."""
        ids, labels = list(masked.ids), [IGNORE_INDEX] * len(masked.ids)
        for start, stop in masked.spans:
            labels[start:stop] = ids[start:stop]
        last, eos = max((stop for _, stop in masked.spans), default=0), self.tokenizer.eos_token_id
        if eos is not None and self._lacks_eos(ids, last):
            ids, labels = [*ids[:last], eos], [*labels[:last], eos]
        return ids, [IGNORE_INDEX, *labels[1:]]

    def _lacks_eos(self, ids: list[int], last: int) -> bool:
        """Whether the trained part ends before `last` without a special token, and only white space follows."""
        if self.masker.ending.ids or not last or ids[last - 1] == self.tokenizer.eos_token_id:
            return False
        return not str(self.tokenizer.decode(ids[last:])).strip()

    def _fit(self, ids: list[int], labels: list[int], masked: MaskedTokens) -> Example | None:
        """The example in at most seq_len tokens; None if it is too long or nothing of it would be trained on."""
        if self.seq_len is None or len(ids) <= self.seq_len:
            return _example(ids, labels)
        if self.too_long == "drop":
            return None
        if self.too_long == "cut_prompt":
            return self._cut_prompt(ids, labels, masked, self.seq_len)
        labels = labels[: self.seq_len]
        return _example(ids[: self.seq_len], labels) if any(label != IGNORE_INDEX for label in labels) else None

    def _cut_prompt(self, ids: list[int], labels: list[int], masked: MaskedTokens, seq_len: int) -> Example | None:
        """Drop the oldest tokens after BOS. The last answer stays whole, after at least one token."""
        prefix = len(self.prefix) if tuple(ids[: len(self.prefix)]) == self.prefix else 0
        start = len(ids) - (seq_len - prefix)
        last_answer = masked.spans[-1][0]
        if self.loss_on != "all" and start > last_answer - (not prefix):
            return None
        cut_answer_end = next((stop for begin, stop in masked.spans if begin < start < stop), start)
        if self.loss_on != "all":  # an answer that lost its beginning is not trained on
            labels = [IGNORE_INDEX if start <= index < cut_answer_end else label for index, label in enumerate(labels)]
        labels = [*labels[:prefix], *labels[start:]]
        labels[0] = IGNORE_INDEX
        return _example([*ids[:prefix], *ids[start:]], labels)

    def _render_text(self, row: TextSample) -> Tokenizing[RenderResult]:
        """BOS if the tokenizer adds it, the text, EOS; in chunks of seq_len."""
        (tokens,) = yield [row.text]
        ids = [*self.prefix, *tokens.ids]
        eos = self.tokenizer.eos_token_id
        ids += [eos] if eos is not None and ids[-1] != eos else []
        seq_len = self.seq_len or len(ids)
        starts = range(0, len(ids), seq_len) if self.too_long != "cut_end" else (0,)
        chunks = [ids[start : start + seq_len] for start in starts]
        chunks = [chunk for chunk in chunks if len(chunk) > 1]  # a single token predicts nothing
        if not chunks:
            raise EmptyRecord("a text of one token")
        examples = tuple(_example(chunk, [IGNORE_INDEX, *chunk[1:]]) for chunk in chunks)
        return RenderResult(examples, int(len(ids) > seq_len), 0, "text")


def make_renderer(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer that the settings ask for. Raises RecipeError for an unknown template."""
    problem = None
    try:
        chosen = choose_template(settings.template, tokenizer)
        template = adapt_template(chosen, tokenizer, settings.system_policy)
        if template.jinja != chosen.jinja:
            template = replace(template, name=f"{template.name}, with a generation prompt")
    except SourceError as error:
        template, problem = Template("", "none"), error
    masker = LossMasker(tokenizer, template, turn_ending(template, tokenizer), splitting_tokens(tokenizer))
    prefix = tuple(prefix_ids(tokenizer))
    return Renderer(tokenizer, template, masker, settings.loss_on, settings.seq_len, settings.too_long, prefix, problem)


def make_example(
    messages: Sequence[Mapping[str, Any]] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    system: str | None = None,
    loss_on: str = "assistant",
) -> Example:
    """One conversation (or text), rendered and masked. Raises SourceError if that cannot be done exactly."""
    renderer = make_renderer(DataSettings((), template=template, loss_on=loss_on), tokenizer)
    try:
        row = TextSample(messages) if isinstance(messages, str) else parse_conversation(messages, system=system)
        examples = renderer.render(row).examples
    except (InvalidRecord, EmptyRecord) as error:
        raise SourceError(f"this conversation cannot be trained on: {error}") from None
    return examples[-1]


def _through_last_answer(row: Conversation) -> Conversation:
    """The conversation without what follows the last message that could be trained on."""
    stop = max((index + 1 for index in range(len(row.messages)) if _is_trainable(row, index)), default=0)
    return Conversation(row.messages[:stop], row.train_flags[:stop], row.tools)


def _is_trainable(row: Conversation, index: int) -> bool:
    return row.messages[index]["role"] == "assistant" or row.train_flags[index] is True


def _trained_messages(row: Conversation, loss_on: str) -> list[int]:
    """The indices of the messages that are trained on."""
    if loss_on == "last":
        last = len(row.messages) - 1
        return [] if last < 0 or row.train_flags[last] is False else [last]
    return [
        index
        for index, (message, train) in enumerate(zip(row.messages, row.train_flags, strict=True))
        if train or (train is None and message["role"] == "assistant")
    ]


def _gaps(masked: MaskedTokens) -> Iterator[tuple[int, int]]:
    """What lies outside the spans."""
    position = 0
    for start, stop in (*masked.spans, (len(masked.ids), len(masked.ids))):
        if start > position:
            yield position, start
        position = stop


def _example(ids: Sequence[int], labels: Sequence[int]) -> Example:
    import numpy as np

    return Example(np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
