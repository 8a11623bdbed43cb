"""Chat templates: the models' own, a few known formats by name, or Jinja from the recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergeforge.errors import RecipeError, SourceError, did_you_mean
from mergeforge.io.aux_files import AuxFile, AuxFiles, InMemoryFile
from mergeforge.tokenizer.hf_files import read_object
from mergeforge.tokenizer.output_files import json_file
from mergeforge.tokenizer.settings import ModelTokenizer

# In Hugging Face's form: `messages`, `add_generation_prompt`, and blocks that strip their line break.
# Sources: ChatML, github.com/openai/openai-python/blob/v0.28.1/chatml.md; Alpaca, github.com/tatsu-lab/stanford_alpaca
# (with "user_context" for its Input); Llama 3's and Mistral's model cards; EXAONE's model card.
NAMED = {
    "alpaca": """\
{%- set systems = messages | selectattr('role', 'equalto', 'system') | list -%}
{%- if systems %}{{ systems[-1]['content'] | trim + '\\n\\n' }}{% endif -%}
{%- set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- for message in messages -%}
  {%- if message['role'] in titles -%}
    {{- '### ' + titles[message['role']] + ':\\n' + message['content'] | trim -}}
    {%- if not loop.last %}{{ '\\n\\n' }}{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '\\n\\n### Response:\\n' }}{% endif -%}
""",
    "chatml": """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
""",
    "exaone": """\
{%- if messages and messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif -%}
{%- for message in messages -%}
  {{- '[|' + message['role'] + '|]' + message['content'] -}}
  {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif -%}
""",
    "llama3": """\
{%- for message in messages -%}
  {%- if loop.first %}{{ bos_token }}{% endif -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim -}}
  {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
""",
    "mistral": """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('after an optional system message, user and assistant must take turns') -}}
  {%- elif message['role'] == 'user' -%}
    {{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
""",
}


def chat_template(template: str, models: Sequence[ModelTokenizer]) -> str | None:
    """The output's chat template. `template`: auto (the most frequent of the models', else None), a name, or Jinja.

    Raises RecipeError for an unknown name, SourceError for unreadable tokenizer files.
    """
    if template == "auto":
        counts = Counter(text.strip() for model in models if model.merged and (text := _own(model.files)))
        return counts.most_common(1)[0][0] if counts else None  # on a tie, the first
    if template in NAMED:
        return NAMED[template]
    if "{" not in template:
        hint = did_you_mean(template, NAMED) or f"use auto, {', '.join(NAMED)}, or a Jinja template"
        raise RecipeError(f"unknown chat template {template!r}", hint=hint)
    return template


def with_chat_template(files: AuxFiles, template: str) -> dict[str, AuxFile]:
    """Return auxiliary files with only this chat template, in chat_template.jinja. Raises SourceError."""
    stale = ("chat_template.json", "additional_chat_templates/")
    kept = {name: content for name, content in files.items() if not name.startswith(stale)}
    kept["chat_template.jinja"] = InMemoryFile("chat_template.jinja", template.encode())
    config = read_object(files, "tokenizer_config.json") or {}
    if config.pop("chat_template", None) is not None:
        kept["tokenizer_config.json"] = json_file("tokenizer_config.json", config)
    return kept


def _own(files: AuxFiles) -> str:
    """A model's default chat template; "" if it has none."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{files['chat_template.jinja']} cannot be read: {error}") from None
    names = ("tokenizer_config.json", "chat_template.json")
    return next((text for name in names if (text := _default(read_object(files, name)))), "")


def _default(config: Mapping[str, Any] | None) -> str:
    """`chat_template` of a JSON file: a string, or a list of named templates with a default."""
    template = (config or {}).get("chat_template")
    if isinstance(template, list):
        defaults = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = defaults[0].get("template") if defaults else None
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""
