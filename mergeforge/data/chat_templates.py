"""Chat templates for training: the tokenizer's own, one of the known ones, `plain`, `raw`, or a Jinja file.

`plain` needs no special token but EOS, so it suits any base model:

    User: How are you?
    Assistant: Well, thanks.</s>

`raw` is the messages' contents one after the other and EOS after each answer. In templates that are not the
tokenizer's own, BOS is put first where the tokenizer puts it before text: then training, and whoever uses the saved
template later, see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import SURROGATE
from mergeforge.data.tokenizers import added_first
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
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
KNOWN = {**NAMED, "plain": PLAIN, "raw": RAW}
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


Messages = Sequence[Mapping[str, Any]]


class TemplateRefusal(Exception):
    """A template does not take these messages; the text is what it says."""


@dataclass(frozen=True)
class Template:
    """Jinja that renders messages. `name`: where it is from; `parts`: it wants contents as lists of parts."""

    jinja: str
    name: str
    parts: bool = False

    @property
    def tagged(self) -> bool:
        """Whether it marks the answers with {% generation %}."""
        return bool(_TAG.search(self.jinja))

    def text(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any] = (), *, prompt: bool = False
    ) -> str:
        """The messages as text; with `prompt`, ready for the assistant's next one. Raises TemplateRefusal."""
        return self._rendered(tokenizer, messages, tools, add_generation_prompt=prompt)[0]

    def tagged_text(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The messages as text, and [start, stop) of the characters that are marked. Raises TemplateRefusal."""
        text, places = self._rendered(tokenizer, messages, tools, return_assistant_tokens_mask=True)
        return text, [(start, stop) for start, stop in places if stop > start]

    def _rendered(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any], **how: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": self.jinja, **how}
        try:
            found: Any = render_jinja_template([self._spelled(messages)], list(tools) or None, **settings)
        except Exception as error:  # Jinja's own, and whatever an expression in it comes upon
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TemplateRefusal(f"the chat template ({self.name}) refuses it: {said}") from None
        (text,), places = found
        if SURROGATE.search(text):
            raise TemplateRefusal("what the chat template makes of it is not UTF-8 text")
        return text, places[0] if places else []

    def _spelled(self, messages: Messages) -> list[dict[str, Any]]:
        if not self.parts:
            return [dict(one) for one in messages]
        return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def choose_template(wanted: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `template:` means. Raises RecipeError for a name that is not known, SourceError for a file."""
    own = _own(tokenizer)
    if wanted in ("auto", "tokenizer") and own:
        return Template(own, "the tokenizer's own")
    if wanted == "tokenizer":
        raise RecipeError("template: the tokenizer has none of its own", hint="template: plain, or another by name")
    if wanted == "auto":
        return _fitted(Template(PLAIN, "plain: the tokenizer has none of its own"), tokenizer)
    if wanted in KNOWN:
        return _fitted(Template(KNOWN[wanted], wanted), tokenizer)
    if "{%" in wanted or "{{" in wanted:
        return _fitted(Template(wanted, "as given"), tokenizer)
    return _fitted(Template(_file(wanted), wanted), tokenizer)


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several by name, none of them `default`
        raise SourceError(f"the tokenizer's chat template: {str(error).splitlines()[0]}") from None


def _file(path: str) -> str:
    here = Path(path).expanduser()
    if not here.is_file():
        known = ("auto", "tokenizer", *KNOWN)
        hint = did_you_mean(path, known) or f"{', '.join(known)}, or a .jinja file"
        raise RecipeError(f"there is no chat template '{path}'", hint=hint)
    try:
        return here.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _fitted(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """With BOS first where the tokenizer puts it before text and the template does not."""
    if "eos_token" in template.jinja and not tokenizer.eos_token:
        hint = "set its eos_token, or name a template that ends its answers by itself"
        raise SourceError(f"template {template.name} ends answers with EOS, which the tokenizer has not", hint=hint)
    first = tokenizer.bos_token
    if not first or tokenizer.bos_token_id not in added_first(tokenizer):
        return template
    try:
        begins = template.text(tokenizer, _PROBE).startswith(first)
    except TemplateRefusal:
        return template
    return template if begins else Template("{{- bos_token -}}\n" + template.jinja, template.name)
