"""Probing: what a template makes of a question and its answer, found out before any row is rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.data.chat_templates import Template, TemplateRefusal
from mergeforge.data.tokenizers import special_ids, tokenize
from mergeforge.errors import SourceError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, QUESTION, ANSWER = "Systemtext", "Questiontext", "Answertext"
_MARK = re.compile(r"<\|[^|<>'{}]+\|>|\[\|[^|\[\]'{}]+\|\]")  # what looks like a special token
_ASKED = {"role": "user", "content": QUESTION}
_ANSWERED = {"role": "assistant", "content": ANSWER}
_INSTRUCTED = {"role": "system", "content": SYSTEM}


@dataclass(frozen=True)
class Ending:
    """What the template writes after the last answer: all of it (`text`), and that up to and with the special tokens
    that it begins with (`mark`, their `ids`)."""

    text: str = ""
    mark: str = ""
    ids: tuple[int, ...] = ()


def fitted(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template in the way in which it takes messages: contents as text, or (of vision models) as lists of parts.

    Raises SourceError where it leaves out or rewrites what messages say.
    """
    for one in (template, replace(template, parts=True)):
        text = _probed(one, tokenizer)
        if text is None:
            continue
        if QUESTION in text and ANSWER in text:
            return one
    if _probed(template, tokenizer) is None:
        return template  # it wants something else than a question and an answer; each row says what
    hint = "name another one with template:, such as chatml or plain"
    raise SourceError(f"the chat template ({template.name}) leaves out or rewrites what messages say", hint=hint)


def ending(template: Template, tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What follows an answer at the end of a conversation."""
    text = _probed(template, tokenizer)
    if text is None or ANSWER not in text:
        return Ending()
    tail, special = text.rpartition(ANSWER)[2], special_ids(tokenizer)
    tokens = tokenize(tokenizer, [tail])[0].ids
    start = next((at for at, token in enumerate(tokens) if token in special), len(tokens))
    if start == len(tokens) or str(tokenizer.decode(tokens[:start])).strip():
        return Ending(tail)
    stop = next((at for at in range(start, len(tokens)) if tokens[at] not in special), len(tokens))
    written = "".join(tokenizer.convert_ids_to_tokens(tokens[start:stop]))
    before, mark, _ = tail.partition(written)
    return Ending(tail, before + mark, tuple(tokens[start:stop])) if mark else Ending(tail)


def template_notes(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a person should know of the template together with this tokenizer."""
    notes, vocabulary = [], tokenizer.get_vocab()
    if marks := [mark for mark in dict.fromkeys(_MARK.findall(template.jinja)) if mark not in vocabulary]:
        notes.append(f"{listing(marks)} of the template are no tokens of the tokenizer, so they are plain text")
    try:
        if SYSTEM not in template.text(tokenizer, [_INSTRUCTED, _ASKED, _ANSWERED]):
            notes.append("the template leaves system messages out")
    except TemplateRefusal:
        pass
    try:
        prompt, text = template.text(tokenizer, [_ASKED], prompt=True), template.text(tokenizer, [_ASKED, _ANSWERED])
        if not text.startswith(prompt):
            before = text.partition(ANSWER)[0]
            notes.append(f"chats begin an answer after {prompt[-24:]!r}, training data after {before[-24:]!r}")
    except TemplateRefusal:
        pass
    return notes


def _probed(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    for before in ([], [_INSTRUCTED]):
        try:
            return template.text(tokenizer, [*before, _ASKED, _ANSWERED])
        except TemplateRefusal:
            continue
    return None
