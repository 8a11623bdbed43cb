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

from mergeforge.data.conversations import SURROGATE
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
_MARK = re.compile(r"<\|[^|<>'{}]+\|>|\[\|[^|\[\]'{}]+\|\]")  # what looks like a special token
KNOWN = {**NAMED, "plain": PLAIN, "raw": RAW}
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class TemplateRefusal(Exception):
    """A template does not take these messages; the text is what it says."""


@dataclass(frozen=True)
class Template:
    """Jinja that renders messages. `name`: where it is from; `tagged`: it marks the answers with {% generation %}."""

    jinja: str
    name: str

    @property
    def tagged(self) -> bool:
        return bool(_TAG.search(self.jinja))

    def text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        *,
        prompt: bool = False,
    ) -> str:
        """The messages as text; with `prompt`, ready for the assistant's next one. Raises TemplateRefusal."""
        try:
            found: Any = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # Jinja's own, and whatever an expression in it comes upon
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TemplateRefusal(f"the chat template ({self.name}) refuses it: {said}") from None
        if SURROGATE.search(found):
            raise TemplateRefusal("what the chat template makes of it is not UTF-8 text")
        return str(found)


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


def marks_without_a_token(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What looks like a special token in the template and is none of the tokenizer: it is rendered as plain text."""
    return [mark for mark in dict.fromkeys(_MARK.findall(template.jinja)) if mark not in tokenizer.get_vocab()]


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
