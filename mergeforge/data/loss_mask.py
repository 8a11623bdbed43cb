"""Loss masks: which tokens of a rendered conversation are the answers, found exactly or not at all.

The first strategy that is exact is used:

1. tags: the template marks the answers itself with {% generation %}.
2. prefix: an answer is what the rendering up to it adds to the rendering of everything before it plus the generation
   prompt, that is, to what the model would be given. Both renderings must be prefixes of the whole. The prompt's tokens
   must be a prefix too; if they are not, the answer's characters decide which tokens belong to it (`offsets`).
3. A template that renders an earlier answer differently from the last one (Qwen3 and DeepSeek-R1 remove its reasoning)
   does not fit 2 as a whole. Then each answer becomes an example of its own, after exactly what the model would be
   given.
4. offsets: the answers are replaced by sentinels. If the text around the sentinels is unchanged around the answers, the
   answers' characters are known, and the tokenizer's offsets give their tokens. This covers generation prompts that
   start the answer (with `<think>`) or that do not exist.

The span of an answer extends through the special token that ends it, and no further: a model that never sees that token
in the loss does not learn to stop.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergeforge.data.chat_templates import Template, TemplateError
from mergeforge.data.conversation import Conversation, InvalidRecord
from mergeforge.data.template_probe import TurnEnding
from mergeforge.data.tokenizers import Offsets, TokenizedText, Tokenizing, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
MAX_PROMPT_END = 64  # characters of a prompt from its last special token
SPLIT_ANSWERS = "one example per answer"


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids, the spans [start, stop) of the answers in order, and the strategy that found them."""

    ids: list[int]
    spans: tuple[Span, ...]
    strategy: str


class AmbiguousMask(Exception):
    """A strategy cannot find the answers exactly; the text says why."""


Strategy = Callable[[Conversation, Sequence[int]], Tokenizing[list[MaskedTokens]]]


@dataclass(frozen=True)
class LossMasker:
    """Finds the answers in conversations rendered by one template for one tokenizer.

    `marks`: the special tokens that the template may write, with their ids; {} if prompts are tokenized as a whole.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    ending: TurnEnding
    marks: Mapping[str, int] = field(default_factory=dict)
    prompt_ends: dict[str, list[int]] = field(default_factory=dict, compare=False)  # tokens of the ends seen so far

    def masks(
        self, conversation: Conversation, indices: Sequence[int], *, split_answers: bool = True
    ) -> Tokenizing[list[MaskedTokens]]:
        """The conversation's tokens with the spans of the messages `indices`.

        One result, or with split_answers possibly one per message. Raises InvalidRecord if the template refuses the
        messages or an answer cannot be found exactly.
        """
        why = ""
        for strategy in self._strategies(split_answers):
            try:
                return (yield from strategy(conversation, indices))
            except AmbiguousMask as error:
                why = f"the chat template ({self.template.name}) cannot be masked exactly: {error}"
            except TemplateError as error:
                why = str(error)
        raise InvalidRecord(why)

    def rendered(self, conversation: Conversation) -> Tokenizing[list[int]]:
        """The conversation's tokens, without looking for answers. Raises InvalidRecord."""
        try:
            text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        except TemplateError as error:
            raise InvalidRecord(str(error)) from None
        (tokens,) = yield [text]
        return tokens.ids

    def _strategies(self, split_answers: bool) -> list[Strategy]:
        if self.template.tagged:
            return [self._from_generation_tags]
        if split_answers:
            return [self._from_prefixes, self._from_prefixes_per_answer, self._from_sentinels]
        return [self._from_prefixes, self._from_sentinels]

    def _from_prefixes_per_answer(
        self, conversation: Conversation, indices: Sequence[int]
    ) -> Tokenizing[list[MaskedTokens]]:
        """For each answer, the conversation up to it, with only this answer in the loss."""
        masks: list[MaskedTokens] = []
        for index in indices:
            masks += yield from self._from_prefixes(_truncated(conversation, index + 1), [index])
        return [replace(mask, strategy=f"{mask.strategy}, {SPLIT_ANSWERS}") for mask in masks]

    def _from_generation_tags(
        self, conversation: Conversation, indices: Sequence[int]
    ) -> Tokenizing[list[MaskedTokens]]:
        answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if any(index not in answers for index in indices):
            raise AmbiguousMask("its {% generation %} tags mark only the assistant's messages")
        text, tagged = self.template.tagged_text(self.tokenizer, conversation.messages, conversation.tools)
        if len(indices) < len(answers):
            one_each = len(tagged) == len(answers)
            owners = answers if one_each else self._tag_owners(conversation, answers, text, tagged)
            tagged = [span for span, owner in zip(tagged, owners, strict=True) if owner in indices]
        if len(tagged) < len(indices):
            raise AmbiguousMask(f"it marks {len(tagged)} answers, but there are {len(indices)}")
        (whole,) = yield [text]
        return [self._from_characters(whole, tagged, "tags")]

    def _tag_owners(
        self, conversation: Conversation, answers: Sequence[int], text: str, tagged: Sequence[Span]
    ) -> list[int]:
        """The message that each tagged span belongs to, if an answer has several."""
        prompts = [self._prompt_and_answer(conversation, index, text)[0] for index in answers]
        if not all(text.startswith(prompt) for prompt in prompts):
            raise AmbiguousMask(f"it marks {len(tagged)} answers, but there are {len(answers)}")
        starts = [len(prompt) for prompt in prompts]
        return [answers[max(bisect_right(starts, start) - 1, 0)] for start, _ in tagged]

    def _from_prefixes(self, conversation: Conversation, indices: Sequence[int]) -> Tokenizing[list[MaskedTokens]]:
        text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        prompts, ends = [], []
        for index in indices:
            prompt, through_answer = self._prompt_and_answer(conversation, index, text)
            through_answer = self._without_final_ending(through_answer, text)
            is_prefix = text.startswith(prompt) and text.startswith(through_answer)
            if not (is_prefix and len(prompt) < len(through_answer)):
                raise AmbiguousMask(f"the rendering up to message {index + 1} is not a prefix of the whole")
            prompts.append(prompt)
            ends.append(len(through_answer))
        starts: list[int | None]
        if all(self._mark_before_end(prompt) for prompt in prompts):
            (whole,) = yield [text]
            starts = [self._start_after_mark(whole, prompt) for prompt in prompts]
        else:
            whole, *before = yield [text, *prompts]
            starts = [len(one.ids) if whole.ids[: len(one.ids)] == one.ids else None for one in before]
        found = [start for start in starts if start is not None]
        if len(found) == len(starts):
            stops = yield from self._stop_tokens(whole, text, ends)
            return [self._masked(whole.ids, list(zip(found, stops, strict=True)), "prefix")]
        characters = [(len(prompt), end) for prompt, end in zip(prompts, ends, strict=True)]
        return [self._from_characters(whole, characters, "offsets")]

    def _mark_before_end(self, prompt: str) -> tuple[int, str] | None:
        """(position, text) of the last special token of the template in a prompt, if it ends shortly before the end."""
        position, mark = max(((prompt.rfind(mark), mark) for mark in self.marks), default=(-1, ""))
        return (position, mark) if position >= max(0, len(prompt) - MAX_PROMPT_END) else None

    def _start_after_mark(self, whole: TokenizedText, prompt: str) -> int | None:
        """The number of the prompt's tokens, if they are a prefix of the whole's.

        A tokenizer splits text at special tokens first. So the tokens before the prompt's last one are the same in
        both, and only what follows it, which is the same in almost every prompt, has to be tokenized.
        """
        found = self._mark_before_end(prompt)
        assert found is not None
        position, mark = found
        end = self._prompt_end(prompt[position:])
        first = whole.encoding.char_to_token(position)
        if first is None or whole.ids[first] != self.marks[mark] or whole.ids[first : first + len(end)] != end:
            return None
        return int(first + len(end))

    def _prompt_end(self, text: str) -> list[int]:
        """The tokens of the end of a prompt."""
        if text not in self.prompt_ends:
            if len(self.prompt_ends) > 1000:
                self.prompt_ends.clear()
            self.prompt_ends[text] = tokenize(self.tokenizer, [text])[0].ids
        return self.prompt_ends[text]

    def _without_final_ending(self, rendering: str, text: str) -> str:
        """The rendering up to an answer, without what the template writes only after the very last one."""
        if text.startswith(rendering) or not self.ending.mark or not rendering.endswith(self.ending.text):
            return rendering
        return rendering.removesuffix(self.ending.text) + self.ending.mark

    def _stop_tokens(self, whole: TokenizedText, text: str, ends: Sequence[int]) -> Tokenizing[list[int]]:
        """The number of tokens before each character position in `ends`."""
        if all(end == len(text) for end in ends):
            return [len(whole.ids)] * len(ends)
        offsets = whole.offsets
        if offsets is not None:
            return [_stop_token(offsets, end) for end in ends]
        prefixes = yield [text[:end] for end in ends]
        if any(whole.ids[: len(prefix.ids)] != prefix.ids for prefix in prefixes):
            raise AmbiguousMask("an answer and what follows it share a token")
        return [len(prefix.ids) for prefix in prefixes]

    def _prompt_and_answer(self, conversation: Conversation, index: int, text: str) -> tuple[str, str]:
        """The rendering before a message with the generation prompt, and the rendering through the message."""
        messages, tools = conversation.messages, conversation.tools
        if messages[index]["role"] != "assistant" or index == 0:
            raise AmbiguousMask(f"message {index + 1} is not an answer to anything")
        prompt = self.template.text(self.tokenizer, messages[:index], tools, prompt=True)
        if index == len(messages) - 1:
            return prompt, text
        return prompt, self.template.text(self.tokenizer, messages[: index + 1], tools)

    def _from_sentinels(self, conversation: Conversation, indices: Sequence[int]) -> Tokenizing[list[MaskedTokens]]:
        text = self.template.text(self.tokenizer, conversation.messages, conversation.tools)
        sentinels = [
            f"Mark{hashlib.sha1(f'{index}{text}'.encode(errors='replace')).hexdigest()[:16]}" for index in indices
        ]
        messages = list(conversation.messages)
        for sentinel, index in zip(sentinels, indices, strict=True):
            messages[index] = {**messages[index], "content": sentinel}
        rest, between = self.template.text(self.tokenizer, messages, conversation.tools), []
        for sentinel in sentinels:
            if rest.count(sentinel) != 1:
                raise AmbiguousMask("an answer is left out or repeated")
            before, _, rest = rest.partition(sentinel)
            between.append(before)
        characters, position = [], 0
        for index, before, after in zip(indices, between, [*between[1:], rest], strict=True):
            start = _skip_text(text, position, before)
            position = _skip_answer(text, start, str(conversation.messages[index]["content"]), after)
            endings = (self.ending.text, self.ending.mark)
            ending = next((candidate for candidate in endings if text.startswith(candidate, position)), "")
            characters.append((start, position + len(ending)))
        if text[position:] != rest:
            raise AmbiguousMask("the text after the last answer depends on it")
        (whole,) = yield [text]
        return [self._from_characters(whole, characters, "offsets")]

    def _from_characters(self, tokens: TokenizedText, characters: Sequence[Span], strategy: str) -> MaskedTokens:
        offsets = tokens.offsets
        if offsets is None:
            raise AmbiguousMask("the tokenizer does not report which characters a token covers")
        spans = [(_start_token(offsets, start), _stop_token(offsets, stop)) for start, stop in characters]
        return self._masked(tokens.ids, spans, strategy)

    def _masked(self, ids: list[int], spans: Sequence[Span], strategy: str) -> MaskedTokens:
        extended = [self._through_ending(ids, start, stop) for start, stop in spans]
        if any(start >= stop for start, stop in extended):
            raise AmbiguousMask("an answer has no tokens")
        return MaskedTokens(ids, tuple(extended), strategy)

    def _through_ending(self, ids: list[int], start: int, stop: int) -> Span:
        """The span through the tokens that end an answer, with or without white space before them."""
        ending, last, after = list(self.ending.ids), stop, stop
        if not ending:
            return start, stop
        while last > start and ids[last - 1] != ending[-1] and self._is_space(ids[last - 1]):
            last -= 1
        if ids[max(start, last - len(ending)) : last] == ending:
            return start, last
        while after < len(ids) and ids[after] != ending[0] and self._is_space(ids[after]):
            after += 1
        return start, after + len(ending) if ids[after : after + len(ending)] == ending else stop

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()


def _truncated(conversation: Conversation, stop: int) -> Conversation:
    return Conversation(conversation.messages[:stop], conversation.train_flags[:stop], conversation.tools)


def _start_token(offsets: Offsets, character: int) -> int:
    """The first token that extends past a character."""
    return bisect_right(offsets, character, key=lambda span: span[1])


def _stop_token(offsets: Offsets, character: int) -> int:
    """The token after the last one that starts before a character."""
    return bisect_left(offsets, character, key=lambda span: span[0])


def _skip_text(text: str, position: int, expected: str) -> int:
    if not text.startswith(expected, position):
        raise AmbiguousMask("the text around an answer depends on it")
    return position + len(expected)


def _skip_answer(text: str, position: int, answer: str, after: str) -> int:
    """The end of an answer that is written verbatim, or without the white space around it."""
    for written in (answer, answer.rstrip(), answer.strip(), answer.lstrip()):
        if written and text.startswith(written + after, position):
            return position + len(written)
    raise AmbiguousMask("an answer is rewritten")
