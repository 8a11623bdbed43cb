"""Probes a template with one question and answer before any row is rendered."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.core.messages import WarningText
from mergeforge.data.chat_templates import Template, TemplateError
from mergeforge.data.system_messages import DROP, MERGE, REFUSE
from mergeforge.data.tokenizers import special_ids, tokenize
from mergeforge.errors import SourceError, format_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, QUESTION, ANSWER = "Systemtext", "Questiontext", "Answertext"
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>'{}]+\|>|\[\|[^|\[\]'{}]+\|\]")  # what looks like one
_USER = {"role": "user", "content": QUESTION}
_ASSISTANT = {"role": "assistant", "content": ANSWER}
_SYSTEM = {"role": "system", "content": SYSTEM}
_POLICY_NOTES = {
    MERGE: "they are put in front of the first user turn (system: merge)",
    DROP: "they are left out (system: drop)",
    REFUSE: "rows that have one are skipped (system: refuse)",
}


@dataclass(frozen=True)
class TurnEnding:
    """What the template writes after the last answer: all of it (`text`), and the start of it through its first
    special tokens (`mark`, with `ids`)."""

    text: str = ""
    mark: str = ""
    ids: tuple[int, ...] = ()


def adapt_template(template: Template, tokenizer: PreTrainedTokenizerBase, system: str = MERGE) -> Template:
    """The template with contents as text or, for vision models, as lists of parts, whichever it renders; with a
    generation prompt, if it has none; and with the policy `system` for system messages, if it does not render them.

    Raises SourceError if it leaves out or rewrites what the messages say.
    """
    template = _with_generation_prompt(_with_contents(template, tokenizer), tokenizer)
    renders_system = _renders_system(template, tokenizer)
    return template if renders_system else replace(template, system=system)


def _with_contents(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
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


def _renders_system(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """False only if the template renders a question and its answer, but not with a system message before them."""
    if _text(template, tokenizer, [_USER, _ASSISTANT]) is None:
        return True
    return SYSTEM in (_text(template, tokenizer, [_SYSTEM, _USER, _ASSISTANT]) or "")


def _with_generation_prompt(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with a generation prompt, if it has none and what it writes before an answer is always the same.

    Without one, programs that chat with the model would not ask it for an answer, and training would teach it to write
    the start of its turn itself.
    """
    start = missing_generation_prompt(template, tokenizer)
    if not start:
        return template
    block = "{% if add_generation_prompt %}{{ " + json.dumps(start) + " }}{% endif %}"
    changed = replace(template, jinja=template.jinja.removesuffix("\n") + block)
    chats = ([_USER], [_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER])
    is_same = all(_text(changed, tokenizer, chat) == _text(template, tokenizer, chat) for chat in chats)
    prompt = _text(changed, tokenizer, [_USER, _ASSISTANT, _USER], prompt=True)
    longer = _text(changed, tokenizer, [_USER, _ASSISTANT, _USER, _ASSISTANT]) or ""
    return changed if is_same and prompt is not None and longer.startswith(prompt) else template


def missing_generation_prompt(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes between a question and its answer, if asking for a generation prompt changes nothing."""
    question = _text(template, tokenizer, [_USER])
    prompt = _text(template, tokenizer, [_USER], prompt=True)
    whole = _text(template, tokenizer, [_USER, _ASSISTANT]) or ""
    before = whole.partition(ANSWER)[0]
    if question is None or question != prompt or not before.startswith(question) or before == whole:
        return ""
    start = before.removeprefix(question)
    return start if start.strip() else ""


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
    if template.system:
        notes.append(f"the template does not render system messages: {_POLICY_NOTES[template.system]}")
    if start := missing_generation_prompt(template, tokenizer):
        notes.append(
            WarningText(
                f"the template has no generation prompt: the start of an answer, {start!r}, is trained on, and "
                "programs that chat with the model do not write it"
            )
        )
        return notes
    try:
        prompt, text = template.text(tokenizer, [_USER], prompt=True), template.text(tokenizer, [_USER, _ASSISTANT])
        if not text.startswith(prompt):
            before = text.partition(ANSWER)[0]
            notes.append(f"in a chat answers start after {prompt[-24:]!r}, in training data after {before[-24:]!r}")
    except TemplateError:
        pass
    return notes


def _text(
    template: Template, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool = False
) -> str | None:
    """The rendered messages; None if the template refuses them."""
    try:
        return template.text(tokenizer, messages, prompt=prompt)
    except TemplateError:
        return None


def _render_probe(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    for system in ([], [_SYSTEM]):
        try:
            return template.text(tokenizer, [*system, _USER, _ASSISTANT])
        except TemplateError:
            continue
    return None
