"""Chats, tokenizers, and the ids of text computed by hand, for the data tests.

A byte is its own id; the most common pairs are 259 to 276 (mergeforge/operations/synthetic_models.py); added tokens
start at 277.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergeforge.data import Example, load_tokenizer
from mergeforge.operations.synthetic_models import PAIRS
from mergeforge.tokenizer.chat_templates import NAMED

IM_START, IM_END = 277, 278
CHATML = NAMED["chatml"]
TAGGED = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m['content'] + '<|im_end|>' }}{% endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
# like Qwen3 and DeepSeek-R1: only the last answer keeps its reasoning
REASONING = """\
{%- for m in messages -%}
{%- set said = m['content'] -%}
{%- if m['role'] == 'assistant' and not loop.last and '</think>' in said -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m['role'] + '\\n' + said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
PROMPT_THINKS = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")


def chatml(folder: Path, template: str = CHATML) -> Any:
    return with_tokens(folder, "<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=template)


def with_tokens(folder: Path, *tokens: str, eos: str = "", template: str | None = None, bos: bool = False) -> Any:
    """The tokenizer with special tokens from 277 on, and optionally EOS, a template, or BOS before every text."""
    tokenizer = load_tokenizer(str(folder))
    if tokens:
        tokenizer.add_tokens(list(tokens), special_tokens=True)
    if eos:
        tokenizer.eos_token = eos
    tokenizer.chat_template = template
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
        )
    return tokenizer


def ids(text: str) -> list[int]:
    """The ids of plain text, computed by hand: bytes, and merged pairs by rank."""
    pieces = [bytes([byte]) for byte in text.encode()]
    for pair in PAIRS:
        at = 0
        while at + 1 < len(pieces):
            if pieces[at] + pieces[at + 1] == pair.encode():
                pieces[at : at + 2] = [pair.encode()]
            at += 1
    known = {pair.encode(): 259 + rank for rank, pair in enumerate(PAIRS)}
    return [known[piece] if piece in known else piece[0] for piece in pieces]


def trained(example: Example) -> list[int]:
    """The ids of the trained tokens; asserts that each label equals its token."""
    assert all(label in (token, -100) for token, label in zip(example.tokens, example.labels, strict=True))
    return [int(label) for label in example.labels if label != -100]


def chat(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Alternating messages, the user's first."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSON Lines; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
