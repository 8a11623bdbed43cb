"""Masks: which tokens of a rendered conversation are the answers, exactly or not at all.

The first way that is exact wins:

1. tags: the template marks the answers itself with {% generation %}.
2. prefix: an answer is what the rendering up to it adds to the rendering of what came before with the generation
   prompt: what the model would be given, and what it should then write. Both must be prefixes of the whole; so must the
   prompt's tokens be, else the answer's characters say which tokens are its (way `offsets`).
3. Templates that render an earlier answer otherwise than the last one (Qwen3 and DeepSeek-R1 take its reasoning out) do
   not fit 2 as a whole. Then each answer becomes an example of its own, with just what the model would be given before.
4. offsets: the answers are replaced with marks; where the rendering around the marks stands unchanged around
   the answers, their characters are known, and through the tokenizer's offsets their tokens. This is for generation
   prompts that begin the answer (with `<think>`) or are not there at all.

An answer's span goes on to the special token that ends it, and not past it: without that token in the loss
a model never learns to stop.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.data.chat_templates import Template, TemplateRefusal
from mergeforge.data.conversation import BadRow, Conversation
from mergeforge.data.template_probe import Ending
from mergeforge.data.tokenizers import Offsets, Tokens, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
APART = "each answer apart"


@dataclass(frozen=True)
class Masked:
    """Token ids, the spans [start, stop) of the answers in order, and the way in which these were found."""

    ids: list[int]
    spans: tuple[Span, ...]
    way: str


class NotExact(Exception):
    """The answers cannot be told from the rest; the text says why."""


@dataclass(frozen=True)
class Masker:
    """Finds the answers in conversations rendered by one template for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    ending: Ending

    def masks(self, conversation: Conversation, wanted: Sequence[int], *, apart: bool = True) -> list[Masked]:
        """The conversation's tokens with the spans of the wanted messages: once, or (`apart`) once for each of these.

        Raises BadRow where the template refuses the messages or an answer cannot be found exactly.
        """
        why = ""
        for way in self._ways(apart):
            try:
                return way(conversation, wanted)
            except NotExact as error:
                why = f"the chat template ({self.template.name}) cannot be masked exactly: {error}"
            except TemplateRefusal as error:
                why = str(error)
        raise BadRow(why)

    def rendered(self, conversation: Conversation) -> list[int]:
        """The conversation's tokens, without a look at what is an answer. Raises BadRow."""
        try:
            text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        except TemplateRefusal as error:
            raise BadRow(str(error)) from None
        return tokenize(self.tokenizer, [text])[0].ids

    def _ways(self, apart: bool) -> list[Callable[[Conversation, Sequence[int]], list[Masked]]]:
        if self.template.tagged:
            return [lambda *row: [self._by_tags(*row)]]
        whole = [lambda *row: [self._by_prefix(*row)], lambda *row: [self._by_marks(*row)]]
        return [whole[0], self._one_by_one, whole[1]] if apart else whole

    def _one_by_one(self, conversation: Conversation, wanted: Sequence[int]) -> list[Masked]:
        """For each answer the conversation up to it, in which it alone is trained on."""
        found = [self._by_prefix(_until(conversation, at + 1), [at]) for at in wanted]
        return [replace(one, way=f"{one.way}, {APART}") for one in found]

    def _by_tags(self, conversation: Conversation, wanted: Sequence[int]) -> Masked:
        answers = [at for at, one in enumerate(conversation.messages) if one["role"] == "assistant"]
        if any(at not in answers for at in wanted):
            raise NotExact("it marks no other messages than the assistant's")
        text, marked = self.template.tagged_text(self.tokenizer, conversation.messages, conversation.tools)
        if len(wanted) < len(answers):
            owners = answers if len(marked) == len(answers) else self._owners(conversation, answers, text, marked)
            marked = [mark for mark, owner in zip(marked, owners, strict=True) if owner in wanted]
        if len(marked) < len(wanted):
            raise NotExact(f"it marks {len(marked)} answers where there are {len(wanted)}")
        return self._from_characters(tokenize(self.tokenizer, [text])[0], marked, "tags")

    def _owners(
        self, conversation: Conversation, answers: Sequence[int], text: str, marked: Sequence[Span]
    ) -> list[int]:
        """The message that each mark belongs to, where there is more than one for an answer."""
        prompts = [self._around(conversation, at, text)[0] for at in answers]
        if not all(text.startswith(prompt) for prompt in prompts):
            raise NotExact(f"it marks {len(marked)} answers where there are {len(answers)}")
        begins = [len(prompt) for prompt in prompts]
        return [answers[max(bisect_right(begins, start) - 1, 0)] for start, _ in marked]

    def _by_prefix(self, conversation: Conversation, wanted: Sequence[int]) -> Masked:
        text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        prompts, ends = [], []
        for at in wanted:
            prompt, until = self._around(conversation, at, text)
            until = self._shared(until, text)
            if not (text.startswith(prompt) and text.startswith(until) and len(prompt) < len(until)):
                raise NotExact(f"the rendering up to message {at + 1} is no beginning of the whole")
            prompts.append(prompt)
            ends.append(len(until))
        whole, *before = tokenize(self.tokenizer, [text, *prompts])
        if all(whole.ids[: len(one.ids)] == one.ids for one in before):
            spans = [(len(one.ids), stop) for one, stop in zip(before, self._stops(whole, text, ends), strict=True)]
            return self._masked(whole.ids, spans, "prefix")
        characters = [(len(prompt), end) for prompt, end in zip(prompts, ends, strict=True)]
        return self._from_characters(whole, characters, "offsets")

    def _shared(self, until: str, text: str) -> str:
        """The rendering up to an answer, without what the template writes after the very last one alone."""
        if text.startswith(until) or not self.ending.mark or not until.endswith(self.ending.text):
            return until
        return until.removesuffix(self.ending.text) + self.ending.mark

    def _stops(self, whole: Tokens, text: str, ends: Sequence[int]) -> list[int]:
        """The tokens before which the characters `ends` lie."""
        if whole.offsets is not None:
            return [_stop(whole.offsets, end) for end in ends]
        until = tokenize(self.tokenizer, [text[:end] for end in ends])
        if any(whole.ids[: len(one.ids)] != one.ids for one in until):
            raise NotExact("an answer and what follows it share a token")
        return [len(one.ids) for one in until]

    def _around(self, conversation: Conversation, at: int, text: str) -> tuple[str, str]:
        """The rendering before a message, with the generation prompt, and the rendering after it."""
        messages, tools = conversation.messages, conversation.tools
        if messages[at]["role"] != "assistant" or at == 0:
            raise NotExact(f"nothing asks for message {at + 1}")
        prompt = self.template.text(self.tokenizer, messages[:at], tools, prompt=True)
        if at == len(messages) - 1:
            return prompt, text
        return prompt, self.template.text(self.tokenizer, messages[: at + 1], tools)

    def _by_marks(self, conversation: Conversation, wanted: Sequence[int]) -> Masked:
        text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        marks = [f"Mark{hashlib.sha1(f'{at}{text}'.encode(errors='replace')).hexdigest()[:16]}" for at in wanted]
        messages = list(conversation.messages)
        for mark, at in zip(marks, wanted, strict=True):
            messages[at] = {**messages[at], "content": mark}
        rest, parts = self.template.text(self.tokenizer, messages, conversation.tools), []
        for mark in marks:
            if rest.count(mark) != 1:
                raise NotExact("an answer is left out, or stands in it more than once")
            part, _, rest = rest.partition(mark)
            parts.append(part)
        characters, here = [], 0
        for at, part, after in zip(wanted, parts, [*parts[1:], rest], strict=True):
            start = _past(text, here, part)
            here = _past_answer(text, start, str(conversation.messages[at]["content"]), after)
            written = next((one for one in (self.ending.text, self.ending.mark) if text.startswith(one, here)), "")
            characters.append((start, here + len(written)))
        if text[here:] != rest:
            raise NotExact("what follows the last answer depends on it")
        return self._from_characters(tokenize(self.tokenizer, [text])[0], characters, "offsets")

    def _from_characters(self, tokens: Tokens, characters: Sequence[Span], way: str) -> Masked:
        if tokens.offsets is None:
            raise NotExact("the tokenizer does not tell which characters a token stands for")
        spans = [(_start(tokens.offsets, start), _stop(tokens.offsets, stop)) for start, stop in characters]
        return self._masked(tokens.ids, spans, way)

    def _masked(self, ids: list[int], spans: Sequence[Span], way: str) -> Masked:
        ended = [self._ended(ids, start, stop) for start, stop in spans]
        if any(start >= stop for start, stop in ended):
            raise NotExact("an answer has no tokens")
        return Masked(ids, tuple(ended), way)

    def _ended(self, ids: list[int], start: int, stop: int) -> Span:
        """The span up to and with the tokens that end an answer; white space may lie between."""
        ends, last, after = list(self.ending.ids), stop, stop
        if not ends:
            return start, stop
        while last > start and ids[last - 1] != ends[-1] and self._is_space(ids[last - 1]):
            last -= 1
        if ids[max(start, last - len(ends)) : last] == ends:
            return start, last
        while after < len(ids) and ids[after] != ends[0] and self._is_space(ids[after]):
            after += 1
        return start, after + len(ends) if ids[after : after + len(ends)] == ends else stop

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()


def _until(conversation: Conversation, stop: int) -> Conversation:
    return Conversation(conversation.messages[:stop], conversation.trained[:stop], conversation.tools)


def _start(offsets: Offsets, character: int) -> int:
    """The first token that reaches past a character."""
    return bisect_right(offsets, character, key=lambda place: place[1])


def _stop(offsets: Offsets, character: int) -> int:
    """The token after the last one that begins before a character."""
    return bisect_left(offsets, character, key=lambda place: place[0])


def _past(text: str, here: int, part: str) -> int:
    if not text.startswith(part, here):
        raise NotExact("what surrounds an answer depends on it")
    return here + len(part)


def _past_answer(text: str, here: int, answer: str, after: str) -> int:
    """Where an answer ends that stands as it is, or without the white space around it."""
    for spelling in (answer, answer.rstrip(), answer.strip(), answer.lstrip()):
        if spelling and text.startswith(spelling + after, here):
            return here + len(spelling)
    raise NotExact("an answer is rewritten")
