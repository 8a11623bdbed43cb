"""Chat templates: the default one and named ones, from every place where a model may keep them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergeforge.gguf.key_values import Keys, Value, array, string
from mergeforge.io.aux_files import AuxFiles
from mergeforge.tokenizer.hf_files import read_object, read_text

_NAMED = re.compile(r"additional_chat_templates/([^/]+)\.jinja")


def template_keys(files: AuxFiles, tokenizer_config: Mapping[str, Any] | None) -> Keys:
    """tokenizer.chat_template and, for named templates, tokenizer.chat_template.NAME and the list of names.

    tokenizer_config.json's `chat_template` comes before chat_template.jinja, as in llama.cpp's converter.
    """
    found = (tokenizer_config or {}).get("chat_template")
    if found is None:
        found = _beside(files)
    if isinstance(found, str):
        return {"tokenizer.chat_template": string(found)} if found else {}
    return _named(found) if isinstance(found, list) else {}


def _beside(files: AuxFiles) -> Any:
    default = read_text(files, "chat_template.jinja")
    if default is None:
        return (read_object(files, "chat_template.json") or {}).get("chat_template")
    named = [(found[1], name) for name in sorted(files) if (found := _NAMED.fullmatch(name))]
    if not named:
        return default
    extra = [{"name": short, "template": read_text(files, name)} for short, name in named]
    return [{"name": "default", "template": default}, *extra]


def _named(choices: list[Any]) -> Keys:
    keys: dict[str, Value] = {}
    names: list[str] = []
    default = ""
    for choice in filter(lambda one: isinstance(one, dict), choices):
        name = re.sub("[^A-Za-z0-9]", "_", choice.get("name") or "")
        template = choice.get("template")
        if name == "default" and template is not None:
            default = template
        elif name and template is not None:
            names += [] if name in names else [name]
            if template:
                keys[f"tokenizer.chat_template.{name}"] = string(template)
    if names:
        keys["tokenizer.chat_templates"] = array("string", names)
    if default:
        keys["tokenizer.chat_template"] = string(default)
    return keys
