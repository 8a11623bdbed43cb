"""Rows of tokens -> the tensors of one forward pass.

A batch has no attention mask: every row starts at position 0, and transformers keeps rows of one sequence apart by
these positions (with no cache and no mask given, its masking_utils.find_packed_sequence_indices). Padding is a row
of its own, without labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mergeforge.train.loop.chunked_loss import IGNORE_INDEX

MULTIPLE = 8  # of a batch's width: tensor cores like it


class SequenceStore(Protocol):
    """Rows of tokens and labels, as mergeforge.data.TokenStore keeps them."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> Any: ...


Rows = list[tuple[Tensor, Tensor]]  # tokens and labels of the rows of one sequence


class PackedSequences(Dataset[Rows]):
    """What a sequence of the training set holds: rows of the store, by index."""

    def __init__(self, store: SequenceStore, packs: Sequence[Sequence[int]]) -> None:
        self.store = store
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, at: int) -> Rows:
        rows = (self.store[row] for row in self.packs[at])
        return [(torch.tensor(one.tokens), torch.tensor(one.labels)) for one in rows]


class EpochShuffler(Sampler[int]):
    """0..n-1 in an order that depends on (seed, epoch) alone: a resumed run sees the rows it would have seen."""

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


def collate(sequences: Sequence[Rows], *, pad: int, width: int | None = None) -> dict[str, Tensor]:
    """input_ids, position_ids and labels, each (sequences, width); `width` None: of the longest sequence."""
    longest = max(sum(len(tokens) for tokens, _ in rows) for rows in sequences)
    width = width or -(-longest // MULTIPLE) * MULTIPLE
    lines = [_line(rows, pad, width) for rows in sequences]
    return {name: torch.stack([line[name] for line in lines]) for name in ("input_ids", "position_ids", "labels")}


def _line(rows: Rows, pad: int, width: int) -> dict[str, Tensor]:
    empty = width - sum(len(tokens) for tokens, _ in rows)
    if empty:
        rows = [*rows, (torch.full((empty,), pad), torch.full((empty,), IGNORE_INDEX))]
    labels = torch.cat([labels for _, labels in rows]).long()
    starts = torch.tensor([0, *(len(tokens) for tokens, _ in rows[:-1])]).cumsum(0)
    labels[starts] = IGNORE_INDEX  # the token before it is another row's
    return {
        "input_ids": torch.cat([tokens for tokens, _ in rows]).long(),
        "position_ids": torch.cat([torch.arange(len(tokens)) for tokens, _ in rows]),
        "labels": labels,
    }


@torch.no_grad()
def separates_packed_rows(model: Any) -> bool:
    """Whether two rows in one sequence get the logits that each gets alone. Tried, since not every model can."""
    size = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    one, two = (torch.arange(low, low + 6) % size for low in (3, 17))
    rows: Rows = [(tokens, tokens) for tokens in (one, two)]
    training = model.training
    model.eval()
    try:
        apart = [_logits(model, [[row]], device)[0, : len(row[0])] for row in rows]
        together = _logits(model, [rows], device)[0, : len(one) + len(two)]
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    expected = torch.cat(apart)
    spread = expected.std().item() or 1.0
    return bool((together - expected).abs().max() < 0.05 * spread)


def _logits(model: Any, sequences: Sequence[Rows], device: torch.device) -> Tensor:
    batch = collate(sequences, pad=0)
    given = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits.float()
