"""Training step by step, under the names that the field uses: load_model, load_dataset, prepare_dataset, SimpleTrainer.

rows = load_dataset("train.jsonl")
prepared = prepare_dataset(rows, "org/model", seq_len=1024)
print(prepared.counts)
trained = SimpleTrainer("org/model", rows).train()
model = load_model(trained.result)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeforge.data import DataSource, Prepared, Record, data_settings, load_tokenizer, prepare
from mergeforge.data.readers.open import read_records, source_files
from mergeforge.eval import ModelBackend, open_model
from mergeforge.train.quick_trainer import QuickTrainer

SimpleTrainer = QuickTrainer


def load_model(model: str | Path, **options: Any) -> ModelBackend:
    """Open a model, adapter or GGUF file to chat with and to measure; see mergeforge.eval.open_model."""
    return open_model(model, **options)


def load_dataset(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file, folder, glob, Hub data set or sample, with their columns.

    Rows that cannot be read are left out. Raises SourceError for files that cannot be read at all.
    """
    source = DataSource(str(path))
    records = (record for file in source_files(source) for record in read_records(source, file))
    return [dict(record.value) for record in records if isinstance(record, Record)]


def prepare_dataset(
    dataset: str | Path | Sequence[Mapping[str, Any]],
    model: str | Path,
    *,
    folder: str | Path | None = None,
    seq_len: int | None = None,
    **settings: Any,
) -> Prepared:
    """Tokens and labels of a data set for a model: what training sees.

    folder: where the tokens are stored (default: a temporary folder). settings: the keys of train.yaml about data.
    """
    data = list(dataset) if not isinstance(dataset, str | Path) else [str(dataset)]
    target = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="mergeforge-data-"))
    return prepare(data_settings({"data": data, **settings}, seq_len=seq_len), load_tokenizer(str(model)), target)
