"""Chat templates, the default one and named ones, from every file in which a model may store them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergeforge.gguf.key_values import Keys, Value, array, string
from mergeforge.io.aux_files import AuxFiles
from mergeforge.tokenizer.hf_files import read_object, read_text

_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/([^/]+)\.jinja")


def chat_template_keys(paths: AuxFiles, tokenizer_config: Mapping[str, Any] | None) -> Keys:
    """tokenizer.chat_template; for named templates tokenizer.chat_template.NAME and the list of names.

    `chat_template` in tokenizer_config.json wins over chat_template.jinja, as in llama.cpp's converter.
    """
    templates = (tokenizer_config or {}).get("chat_template")
    if templates is None:
        templates = _template_files(paths)
    if isinstance(templates, str):
        return {"tokenizer.chat_template": string(templates)} if templates else {}
    return _named_keys(templates) if isinstance(templates, list) else {}


def _template_files(paths: AuxFiles) -> Any:
    """The templates in files of their own, in the form of tokenizer_config.json's `chat_template`."""
    default = read_text(paths, "chat_template.jinja")
    if default is None:
        return (read_object(paths, "chat_template.json") or {}).get("chat_template")
    names = {path: match[1] for path in sorted(paths) if (match := _NAMED_TEMPLATE.fullmatch(path))}
    if not names:
        return default
    named = [{"name": name, "template": read_text(paths, path)} for path, name in names.items()]
    return [{"name": "default", "template": default}, *named]


def _named_keys(entries: list[Any]) -> Keys:
    keys: dict[str, Value] = {}
    names: list[str] = []
    default = ""
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        name = re.sub("[^A-Za-z0-9]", "_", entry.get("name") or "")
        template = entry.get("template")
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
