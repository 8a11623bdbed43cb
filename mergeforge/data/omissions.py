"""What a template leaves out of a conversation: tool calls, tool results, tools and reasoning.

A template that does not know a field of a message does not complain; Jinja renders nothing. Trained on that, a model
learns empty answers, or answers to results that it never sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergeforge.data.chat_templates import Template, TemplateError
from mergeforge.data.conversation import Conversation, InvalidRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOLS, REASONING = "the definitions of tools", "reasoning_content"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PLAIN = re.compile(r"[\w ]+", re.ASCII)  # no format escapes it
_OTHER = "Othertext"  # stands in for a text, to see whether the rendering changes


def needs_check(row: Conversation) -> bool:
    """Whether a conversation holds more than contents, which the template is known to render."""
    return bool(row.tools) or any(
        len(message) > 2 or (message["role"] in ("tool", "system") and index)
        for index, message in enumerate(row.messages)
    )


def refuse_omissions(
    row: Conversation, trained: Sequence[int], trained_text: str, template: Template, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise InvalidRecord if the template leaves out a message, or a tool call.

    trained: the messages that are trained on; trained_text: their text as it is rendered.
    """
    for index, message in enumerate(row.messages):
        for call in message.get("tool_calls") or ():
            in_text = index not in trained or _is_written(call, trained_text)
            if not (in_text and _depends_on(row, index, "tool_calls", template, tokenizer)):
                name = call["function"]["name"]
                raise InvalidRecord(f"the chat template ({template.name}) leaves out the call of the tool '{name}'")
        if message["content"] and not _depends_on(row, index, "content", template, tokenizer):
            text = f"leaves out message {index + 1} ({message['role']})"
            raise InvalidRecord(f"the chat template ({template.name}) {text}")


def omitted_fields(row: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the template leaves out that a model can be trained without: tools, and the last answer's reasoning."""
    if row.tools and _render(row, template, tokenizer) == _render(replace(row, tools=()), template, tokenizer):
        yield TOOLS
    last = max((index for index, message in enumerate(row.messages) if message["role"] == "assistant"), default=None)
    key = next((key for key in REASONING_KEYS if last is not None and row.messages[last].get(key)), None)
    if last is not None and key is not None and not _depends_on(row, last, key, template, tokenizer):
        yield REASONING


def _is_written(call: Mapping[str, Any], text: str) -> bool:
    """Whether a text holds a tool call in some format: the values of its arguments, or if they are not plain words, its
    name or theirs."""
    arguments = call["function"].get("arguments")
    values = [word for word in map(str, _leaves(arguments)) if _PLAIN.fullmatch(word)]
    if values:
        return all(word in text for word in values)
    names = [call["function"]["name"], *(arguments if isinstance(arguments, Mapping) else ())]
    return any(str(name) in text for name in names)


def _leaves(value: Any) -> Iterator[str | int]:
    """The texts and whole numbers in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield value


def _depends_on(
    row: Conversation, index: int, key: str, template: Template, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether the rendering changes with a field of a message."""
    message = dict(row.messages[index])
    if key == "tool_calls":
        function = {"name": _OTHER, "arguments": {_OTHER: _OTHER}}
        message[key] = [
            {"id": "0" * 9, "type": "function", **_ids(call), "function": function} for call in message[key]
        ]
    else:
        message[key] = _OTHER
    changed = replace(row, messages=(*row.messages[:index], message, *row.messages[index + 1 :]))
    return _render(changed, template, tokenizer) != _render(row, template, tokenizer)


def _ids(call: Any) -> dict[str, Any]:
    return {"id": call["id"]} if isinstance(call, Mapping) and "id" in call else {}


def _render(row: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return template.text(tokenizer, row.messages, row.tools)
    except TemplateError as error:
        return str(error)
