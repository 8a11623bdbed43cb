"""Model cards: README.md with YAML front matter, as the Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LICENSE_KEYS = ("license", "license_name", "license_link")
_FENCE = "---"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name: str) -> bool:
    """Whether a name is that of a Hub repo (owner/name), and of no local folder."""
    return bool(_REPO_ID.fullmatch(name)) and not Path(name).exists()


def write_card(front: Mapping[str, Any], title: str, body: str) -> str:
    """A card: front matter, a heading, and the body."""
    matter = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"{_FENCE}\n{matter}{_FENCE}\n# {title}\n\n{body}"


def front_matter(card: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none, or none that is a YAML mapping.

    As llama.cpp's converter reads it (gguf-py/gguf/metadata.py, Metadata.load_model_card): the language code `no` is
    not a boolean, and tabs, which YAML refuses but some cards have, are spaces.
    """
    lines = card.splitlines()
    if not lines or lines[0] != _FENCE:
        return {}
    stop = lines.index(_FENCE, 1) if _FENCE in lines[1:] else len(lines)
    text = "\n".join(lines[1:stop]).replace("\t", "  ") + "\n"
    try:
        matter = yaml.safe_load(text.replace("- no\n", '- "no"\n'))
    except yaml.YAMLError:
        return {}
    return matter if isinstance(matter, dict) else {}


def read_front_matter(path: Path) -> dict[str, Any]:
    """The front matter of a card's file; empty where the file is missing or not text."""
    try:
        return front_matter(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
