"""Probes a template with one question and answer before any row is rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.data.chat_templates import Template, TemplateError
from mergeforge.data.tokenizers import special_ids, tokenize
from mergeforge.errors import SourceError, format_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, QUESTION, ANSWER = "Systemtext", "Questiontext", "Answertext"
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>'{}]+\|>|\[\|[^|\[\]'{}]+\|\]")  # what looks like one
_USER = {"role": "user", "content": QUESTION}
_ASSISTANT = {"role": "assistant", "content": ANSWER}
_SYSTEM = {"role": "system", "content": SYSTEM}


@dataclass(frozen=True)
class TurnEnding:
    """What the template writes after the last answer: all of it (`text`), and the start of it through its first
    special tokens (`mark`, with `ids`)."""

    text: str = ""
    mark: str = ""
    ids: tuple[int, ...] = ()


def adapt_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with contents as text or, for vision models, as lists of parts, whichever it renders.

    Raises SourceError if it leaves out or rewrites what the messages say.
    """
    for variant in (template, replace(template, parts=True)):
        text = _render_probe(variant, tokenizer)
        if text is None:
            continue
        if QUESTION in text and ANSWER in text:
            return variant
    if _render_probe(template, tokenizer) is None:
        return template  # it expects something other than a question and an answer; each row reports what
    hint = "name another template, such as template: chatml or template: plain"
    raise SourceError(f"the chat template ({template.name}) leaves out or rewrites message contents", hint=hint)


def turn_ending(template: Template, tokenizer: PreTrainedTokenizerBase) -> TurnEnding:
    """What follows an answer at the end of a conversation."""
    text = _render_probe(template, tokenizer)
    if text is None or ANSWER not in text:
        return TurnEnding()
    tail, special = text.rpartition(ANSWER)[2], special_ids(tokenizer)
    tokens = tokenize(tokenizer, [tail])[0].ids
    start = next((index for index, token in enumerate(tokens) if token in special), len(tokens))
    if start == len(tokens) or str(tokenizer.decode(tokens[:start])).strip():
        return TurnEnding(tail)
    stop = next((index for index in range(start, len(tokens)) if tokens[index] not in special), len(tokens))
    written = "".join(tokenizer.convert_ids_to_tokens(tokens[start:stop]))
    before, mark, _ = tail.partition(written)
    return TurnEnding(tail, before + mark, tuple(tokens[start:stop])) if mark else TurnEnding(tail)


def template_notes(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Facts about the template with this tokenizer that the user should know."""
    notes, vocabulary = [], tokenizer.get_vocab()
    markers = dict.fromkeys(_SPECIAL_TOKEN.findall(template.jinja))
    if unknown := [marker for marker in markers if marker not in vocabulary]:
        notes.append(f"the template writes {format_list(unknown)}, which the tokenizer reads as plain text")
    try:
        if SYSTEM not in template.text(tokenizer, [_SYSTEM, _USER, _ASSISTANT]):
            notes.append("the template leaves out system messages")
    except TemplateError:
        pass
    try:
        prompt, text = template.text(tokenizer, [_USER], prompt=True), template.text(tokenizer, [_USER, _ASSISTANT])
        if not text.startswith(prompt):
            before = text.partition(ANSWER)[0]
            notes.append(f"in a chat answers start after {prompt[-24:]!r}, in training data after {before[-24:]!r}")
    except TemplateError:
        pass
    return notes


def _render_probe(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    for system in ([], [_SYSTEM]):
        try:
            return template.text(tokenizer, [*system, _USER, _ASSISTANT])
        except TemplateError:
            continue
    return None
