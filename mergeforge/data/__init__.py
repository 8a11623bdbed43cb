"""Data: rows of files, folders, the Hub or Python -> tokens and labels, and what was decided on the way.

settings = settings_of({"data": ["train.jsonl"], "val": 0.05}, seq_len=1024)
prepared = prepare(settings, load_tokenizer("model"), Path("run/data"))
prepared.train[0].tokens, prepared.train[0].labels, prepared.counts, prepared.decisions
"""

from __future__ import annotations

from mergeforge.data.chat_templates import Template, choose_template
from mergeforge.data.conversation import Conversation, Passage
from mergeforge.data.counts import Counts, Skipped
from mergeforge.data.formats import Format
from mergeforge.data.prepare import Prepared, open_prepared, prepare
from mergeforge.data.readers.open import Bad, Row
from mergeforge.data.render import UNTRAINED, Example, Renderer, example, make_renderer
from mergeforge.data.settings import FIELDS, DataSettings, DataSource, settings_of
from mergeforge.data.source_reader import Decision, open_files
from mergeforge.data.stats import prompts_of
from mergeforge.data.token_store import TokenStore
from mergeforge.data.tokenizers import load_tokenizer

__all__ = [
    "FIELDS",
    "UNTRAINED",
    "Bad",
    "Conversation",
    "Counts",
    "DataSettings",
    "DataSource",
    "Decision",
    "Example",
    "Format",
    "Passage",
    "Prepared",
    "Renderer",
    "Row",
    "Skipped",
    "Template",
    "TokenStore",
    "choose_template",
    "example",
    "load_tokenizer",
    "make_renderer",
    "open_files",
    "open_prepared",
    "prepare",
    "prompts_of",
    "settings_of",
]
