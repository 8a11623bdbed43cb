"""Training data: rows of files, folders, the Hub or Python become token ids and labels.

settings = data_settings({"data": ["train.jsonl"], "val": 0.05}, seq_len=1024)
prepared = prepare(settings, load_tokenizer("model"), Path("run/data"))
prepared.train[0].tokens, prepared.train[0].labels, prepared.counts, prepared.decisions
"""

from __future__ import annotations

from mergeforge.data.chat_templates import Template, choose_template
from mergeforge.data.conversation import Conversation, TextSample
from mergeforge.data.counts import DataStats, Skipped
from mergeforge.data.formats import Format
from mergeforge.data.preference import PreferenceSample
from mergeforge.data.prepare import Prepared, open_prepared, prepare
from mergeforge.data.readers.base import Record, UnreadableRecord
from mergeforge.data.render import IGNORE_INDEX, Example, Renderer, make_example, make_renderer
from mergeforge.data.settings import FIELDS, DataSettings, DataSource, data_settings, row_source
from mergeforge.data.source_reader import Decision, open_files
from mergeforge.data.stats import first_prompts
from mergeforge.data.token_store import TokenStore
from mergeforge.data.tokenizers import load_tokenizer

__all__ = [
    "FIELDS",
    "IGNORE_INDEX",
    "Conversation",
    "DataSettings",
    "DataSource",
    "DataStats",
    "Decision",
    "Example",
    "Format",
    "PreferenceSample",
    "Prepared",
    "Record",
    "Renderer",
    "Skipped",
    "Template",
    "TextSample",
    "TokenStore",
    "UnreadableRecord",
    "choose_template",
    "data_settings",
    "first_prompts",
    "load_tokenizer",
    "make_example",
    "make_renderer",
    "open_files",
    "open_prepared",
    "prepare",
    "row_source",
]
