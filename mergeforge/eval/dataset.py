"""The rows to score: from a file, with the model's own tokenizer and template, or given as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mergeforge.data import IGNORE_INDEX, DataSettings, DataSource, DataStats, prepare, row_source
from mergeforge.data.token_store import KEYS
from mergeforge.eval.backend import ModelBackend, TokenRow
from mergeforge.eval.stop_strings import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROW_TOKENS = 8192  # even if the context is longer


class RowList(Protocol):
    """Rows by number: a list, or a TokenStore."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> TokenRow: ...


EvalData = str | Path | DataSettings | RowList | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EvalRows:
    """Rows, each with a key that depends on its content and not on the tokenizer; `counts`: of the data."""

    rows: RowList
    keys: Sequence[int]
    counts: DataStats | None = None
    template: str = ""  # where it comes from

    def select(self, limit: int | None) -> list[int]:
        """The indices of all rows, or of those with the `limit` smallest keys: pseudo-random, but always the same."""
        if limit is None:
            return list(range(len(self.keys)))
        selected = set(sorted(set(self.keys))[:limit])
        return [index for index, key in enumerate(self.keys) if key in selected]


def make_rows(data: EvalData, model: ModelBackend, folder: Path) -> EvalRows:
    """The data as rows for this model, written below `folder`; rows that are already tokens stay as they are.

    data: a file, settings, tokens, or a list of rows with columns as in a file.
    """
    if source := row_source(data):
        data = DataSettings(sources=(source,))
    if isinstance(data, str | Path):
        data = DataSettings(sources=(DataSource(str(data)),))
    if not isinstance(data, DataSettings):
        tokens = cast(RowList, data)
        return EvalRows(tokens, range(len(tokens)))
    settings = replace(data, validation=None, seq_len=min(data.seq_len or MAX_ROW_TOKENS, model.context))
    if settings.template == "auto" and model.kind == "gguf" and model.template:
        settings = replace(settings, template=model.template)
    prepared = prepare(settings, model.tokenizer, folder)
    import numpy as np

    keys = np.fromfile(prepared.folder / KEYS, np.uint64).tolist()
    return EvalRows(prepared.train, keys, prepared.counts, prepared.template_name)


def scored_spans(row: TokenRow) -> list[tuple[int, int]]:
    """[start, stop) of each run of scored tokens; the first token has no predecessor and is never scored."""
    scored = [False, *(row.labels[1:] != IGNORE_INDEX).tolist(), False]
    edges = [index for index in range(1, len(scored)) if scored[index] != scored[index - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def scored_nbytes(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> int:
    """UTF-8 bytes of the scored tokens' text within the whole: decoders strip a leading space."""
    return sum(
        _text_nbytes(tokenizer, row, stop) - _text_nbytes(tokenizer, row, start) for start, stop in scored_spans(row)
    )


def _text_nbytes(tokenizer: PreTrainedTokenizerBase, row: TokenRow, stop: int) -> int:
    return len(decode(tokenizer, row.tokens[:stop].tolist(), special=False).encode())


def has_scored_tokens(row: TokenRow) -> bool:
    """Whether any token of the row can be scored."""
    return bool((row.labels[1:] != IGNORE_INDEX).any())
