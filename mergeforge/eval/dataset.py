"""The rows that are scored: of a file, made with a model's own tokenizer and template, or given as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mergeforge.data import Counts, DataSettings, DataSource, prepare
from mergeforge.eval.backend import UNTRAINED, Answerer, Row
from mergeforge.eval.stop_strings import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = "keys.u64"  # of mergeforge/data/token_store.py
LENGTH = 8192  # tokens of a row at most, where the context is longer


class RowList(Protocol):
    """Rows by number: a list, or a TokenStore."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> Row: ...


Data = str | Path | DataSettings | RowList


@dataclass(frozen=True)
class Rows:
    """Rows with a key each, which is the same for the same content whatever the tokenizer; `counts`: of the data."""

    rows: RowList
    keys: Sequence[int]
    counts: Counts | None = None
    template: str = ""  # where it is from

    def chosen(self, limit: int | None) -> list[int]:
        """The places of all rows, or of those with the `limit` smallest keys: as good as drawn, the same every time."""
        if limit is None:
            return list(range(len(self.keys)))
        kept = set(sorted(set(self.keys))[:limit])
        return [at for at, key in enumerate(self.keys) if key in kept]


def rows_of(data: Data, answerer: Answerer, folder: Path) -> Rows:
    """The data as rows for this model, written below `folder`; rows that are tokens already as they are."""
    if isinstance(data, str | Path):
        data = DataSettings(sources=(DataSource(str(data)),))
    if not isinstance(data, DataSettings):
        return Rows(data, range(len(data)))
    settings = replace(data, validation=None, seq_len=min(data.seq_len or LENGTH, answerer.context))
    if settings.template == "auto" and answerer.kind == "gguf" and answerer.template:
        settings = replace(settings, template=answerer.template)
    found = prepare(settings, answerer.tokenizer, folder)
    import numpy as np

    keys = np.fromfile(found.folder / KEYS, np.uint64).tolist()
    return Rows(found.train, keys, found.counts, found.template_name)


def spans(row: Row) -> list[tuple[int, int]]:
    """[start, stop) of each run of counted tokens; the first token of all has nothing before it and never counts."""
    counted = [False, *(row.labels[1:] != UNTRAINED).tolist(), False]
    edges = [at for at in range(1, len(counted)) if counted[at] != counted[at - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def nbytes(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
    """Bytes of the counted tokens' text in UTF-8, as they stand in the whole: decoders strip a text's first space."""
    return sum(_length(tokenizer, row, stop) - _length(tokenizer, row, start) for start, stop in spans(row))


def _length(tokenizer: PreTrainedTokenizerBase, row: Row, stop: int) -> int:
    return len(decoded(tokenizer, row.tokens[:stop].tolist(), special=False).encode())


def counts_anything(row: Row) -> bool:
    """Whether any token of the row can be scored."""
    return bool((row.labels[1:] != UNTRAINED).any())
