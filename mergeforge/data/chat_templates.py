"""Chat templates for training: the tokenizer's own, a known one by name, `plain`, `raw`, or a Jinja file.

`plain` needs no special token except EOS, so it suits any base model:

    User: How are you?
    Assistant: Well, thanks.</s>

`raw` concatenates the contents of the messages, with EOS after each answer. A template that is not the tokenizer's own
gets BOS at the start if the tokenizer puts BOS before text. Training, and whoever uses the saved template later, then
see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import SURROGATE
from mergeforge.data.system_messages import REFUSE, without_system_messages
from mergeforge.data.tokenizers import prefix_ids
from mergeforge.errors import RecipeError, SourceError, did_you_mean
from mergeforge.tokenizer.chat_templates import NAMED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'} -%}
{%- for message in messages -%}
  {%- if not loop.first %}{{ '\\n' }}{% endif -%}
  {{- names[message['role']] + ': ' + message['content'] -}}
  {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif -%}
"""
RAW = """\
{%- for message in messages -%}
  {{- message['content'] -}}
  {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}
"""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATES = {**NAMED, "plain": PLAIN, "raw": RAW}
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


Messages = Sequence[Mapping[str, Any]]


class TemplateError(Exception):
    """A template refuses these messages; the text is its error message."""


@dataclass(frozen=True)
class Template:
    """Jinja that renders messages. `name`: where it comes from; `parts`: it expects contents as lists of parts.

    `system`: what to do with system messages if it refuses or ignores them (one of SYSTEM_POLICIES); "": it renders
    them.
    """

    jinja: str
    name: str
    parts: bool = False
    system: str = ""

    @property
    def tagged(self) -> bool:
        """Whether it marks the answers with {% generation %}."""
        return bool(_GENERATION_TAG.search(self.jinja))

    def text(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any] = (), *, prompt: bool = False
    ) -> str:
        """The rendered messages; with `prompt`, followed by the generation prompt. Raises TemplateError."""
        return self._render(tokenizer, messages, tools, add_generation_prompt=prompt)[0]

    def tagged_text(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered messages, and [start, stop) of the characters it marks as answers. Raises TemplateError."""
        text, spans = self._render(tokenizer, messages, tools, return_assistant_tokens_mask=True)
        return text, [(start, stop) for start, stop in spans if stop > start]

    def _render(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any], **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.system and any(message["role"] == "system" for message in messages):
            if self.system == REFUSE:
                raise TemplateError(f"the chat template ({self.name}) does not render system messages")
            messages = without_system_messages(messages, self.system)
        arguments: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": self.jinja, **options}
        try:
            rendered: Any = render_jinja_template([self._with_parts(messages)], list(tools) or None, **arguments)
        except Exception as error:  # Jinja's own, and anything that an expression in it raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TemplateError(f"the chat template ({self.name}) rejects it: {reason}") from None
        (text,), spans = rendered
        if SURROGATE.search(text):
            raise TemplateError(f"the chat template ({self.name}) produces text that is not valid UTF-8")
        return text, spans[0] if spans else []

    def _with_parts(self, messages: Messages) -> list[dict[str, Any]]:
        if not self.parts:
            return [dict(message) for message in messages]
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `template: NAME` means. Raises RecipeError for an unknown name, SourceError for a bad file."""
    own = _tokenizer_template(tokenizer)
    if name in ("auto", "tokenizer") and own:
        return Template(own, "the tokenizer's own")
    if name == "tokenizer":
        raise RecipeError("template: the tokenizer has no chat template", hint="template: plain, or another name")
    if name == "auto":
        return _with_bos(Template(PLAIN, "plain: the tokenizer has no chat template"), tokenizer)
    if name in TEMPLATES:
        return _with_bos(Template(TEMPLATES[name], name), tokenizer)
    if "{%" in name or "{{" in name:
        return _with_bos(Template(name, "given as Jinja"), tokenizer)
    return _with_bos(Template(_read_file(name), name), tokenizer)


def _tokenizer_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several named templates, none of them `default`
        raise SourceError(f"the tokenizer's chat template: {str(error).splitlines()[0]}") from None


def _read_file(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        known = ("auto", "tokenizer", *TEMPLATES)
        hint = did_you_mean(path, known) or f"{', '.join(known)}, or a .jinja file"
        raise RecipeError(f"there is no chat template '{path}'", hint=hint)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _with_bos(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with BOS at its start, if the tokenizer puts BOS before text and the template does not."""
    if "eos_token" in template.jinja and not tokenizer.eos_token:
        hint = "set its eos_token, or name a template that does not use eos_token"
        raise SourceError(f"template {template.name} ends answers with EOS, but the tokenizer has no EOS", hint=hint)
    bos = tokenizer.bos_token
    if not bos or tokenizer.bos_token_id not in prefix_ids(tokenizer):
        return template
    try:
        starts_with_bos = template.text(tokenizer, _PROBE).startswith(bos)
    except TemplateError:
        return template
    return template if starts_with_bos else Template("{{- bos_token -}}\n" + template.jinja, template.name)
