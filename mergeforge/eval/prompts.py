"""A conversation as what a model goes on from: its tokens, or plain text where there is no template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.data.chat_templates import TemplateRefusal, choose_template
from mergeforge.data.tokenizers import tokenize
from mergeforge.errors import SourceError
from mergeforge.eval.backend import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str = "auto") -> list[int]:
    """The tokens of a conversation up to where the assistant begins. Raises SourceError if the template refuses it."""
    try:
        text = choose_template(template, tokenizer).text(tokenizer, messages, prompt=True)
    except TemplateRefusal as error:
        raise SourceError(str(error)) from None
    return tokenize(tokenizer, [text])[0].ids


def plain_prompt(messages: Messages, eos: str) -> str:
    """What the template `plain` (mergeforge/data/chat_templates.py) makes of a conversation, without Jinja."""
    turns = [
        f"{ROLES.get(message['role'], 'User')}: {message['content']}{eos if message['role'] == 'assistant' else ''}"
        for message in messages
    ]
    return "\n".join([*turns, "Assistant:"])
