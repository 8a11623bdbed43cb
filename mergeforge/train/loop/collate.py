"""Rows of tokens -> the tensors of one forward pass.

A batch has no attention mask: every row starts at position 0, and transformers keeps the rows of one sequence apart by
these positions (without a cache and a mask; its masking_utils.find_packed_sequence_indices). Padding is a row of its
own, without labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mergeforge.train.loop.chunked_loss import IGNORE_INDEX

WIDTH_MULTIPLE = 8  # of a batch's width, for tensor cores
LOSS_WEIGHTS = "loss_weights"


class SequenceStore(Protocol):
    """Rows of tokens and labels, as mergeforge.data.TokenStore stores them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Row(NamedTuple):
    """A row of data. `weight`: how much each of its tokens counts in the loss."""

    tokens: Tensor
    labels: Tensor
    weight: float = 1.0


Rows = list[Row]  # of one sequence


class PackedSequences(Dataset[Rows]):
    """The sequences of a data set: each holds the rows of the store that its pack names by index."""

    def __init__(self, store: SequenceStore, packs: Sequence[Sequence[int]]) -> None:
        self.store = store
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Rows:
        examples = (self.store[row] for row in self.packs[index])
        return [Row(torch.tensor(example.tokens), torch.tensor(example.labels), example.weight) for example in examples]


class EpochShuffler(Sampler[int]):
    """0..n-1 in an order that depends on (seed, epoch) alone, so that a resumed run sees the same rows."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        yield from np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()


def collate(
    sequences: Sequence[Rows], *, pad: int, width: int | None = None, weighted: bool = False
) -> dict[str, Tensor]:
    """input_ids, position_ids and labels, each (sequences, width); with `weighted`, loss_weights too.

    `width` None: the longest sequence, rounded up.
    """
    longest = max(sum(len(row.tokens) for row in rows) for rows in sequences)
    width = width or -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    padded = [_padded_sequence(rows, pad, width) for rows in sequences]
    names = [name for name in padded[0] if weighted or name != LOSS_WEIGHTS]
    return {name: torch.stack([tensors[name] for tensors in padded]) for name in names}


def _padded_sequence(rows: Rows, pad: int, width: int) -> dict[str, Tensor]:
    padding = width - sum(len(row.tokens) for row in rows)
    if padding:
        rows = [*rows, Row(torch.full((padding,), pad), torch.full((padding,), IGNORE_INDEX))]
    labels = torch.cat([row.labels for row in rows]).long()
    starts = torch.tensor([0, *(len(row.tokens) for row in rows[:-1])]).cumsum(0)
    labels[starts] = IGNORE_INDEX  # the token before it belongs to another row
    return {
        "input_ids": torch.cat([row.tokens for row in rows]).long(),
        "position_ids": torch.cat([torch.arange(len(row.tokens)) for row in rows]),
        "labels": labels,
        LOSS_WEIGHTS: torch.cat([torch.full((len(row.tokens),), row.weight) for row in rows]),
    }


@torch.no_grad()
def separates_packed_rows(model: Any) -> bool:
    """Whether two rows in one sequence get the logits that each gets alone. Not every model can, so it is tried."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    rows = [Row(tokens, tokens) for tokens in (torch.arange(first, first + 6) % vocabulary for first in (3, 17))]
    training = model.training
    model.eval()
    try:
        alone = torch.cat([_logits(model, [[row]], device)[0, : len(row.tokens)] for row in rows])
        packed = _logits(model, [rows], device)[0, : len(alone)]
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    spread = alone.std().item() or 1.0
    return bool((packed - alone).abs().max() < 0.05 * spread)


@torch.no_grad()
def reads_ahead(model: Any) -> bool:
    """Whether a token's logits depend on tokens after it, as PaliGemma's do: the answer would be in its own input."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(3, 3 + 2 * WIDTH_MULTIPLE) % vocabulary  # a whole width: padding may hide it
    changed = torch.cat([tokens[:8], (tokens[8:] + 7) % vocabulary])
    training = model.training
    model.eval()
    try:
        first, second = (_logits(model, [[Row(row, row)]], device)[0, :8] for row in (tokens, changed))
    finally:
        model.train(training)
    return bool((first - second).abs().max() > 0.05 * (first.std().item() or 1.0))


def _logits(model: Any, sequences: Sequence[Rows], device: torch.device) -> Tensor:
    batch = collate(sequences, pad=0)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
