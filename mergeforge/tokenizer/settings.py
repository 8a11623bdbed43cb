"""What a recipe says of the tokenizer, and what is decided from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.io.aux_files import AuxFiles, SideFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int32]  # for each output row: a row of a model's tensor; -1: none


@dataclass(frozen=True)
class Zero:
    """A row of zeros: `{kind: zero}`."""


@dataclass(frozen=True)
class ModelToken:
    """Another token's row: `{kind: model_token, model, token}` or, instead of `token`, its `token_id`."""

    model: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenSetting:
    """An entry of `tokenizer.tokens`: which row a token takes in models that lack it; with `force`, in all.

    `source`: a model's label (its row of the same token), a ModelToken, Zero, or None: as for any other token.
    """

    source: str | ModelToken | Zero | None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """`source`: union, base or a model's label. `tokens`: settings of single tokens, added where they are new."""

    source: str = "union"
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class TokenizerOf:
    """A model: its label, the files beside its weights by name, the rows of its embedding.

    `merged`: its weights are merged; else the recipe names it for its tokenizer or for single rows
    alone, and no token takes its row unasked.
    """

    label: str
    files: AuxFiles
    rows: int
    merged: bool = True


@dataclass(frozen=True, eq=False)
class RowPicks:
    """Which rows a model's embedding (or head) for the output's tokenizer is made of.

    `sources`: a model's label -> the rows of its tensor that the output's rows take, -1 where none.
    An output row with several is their mean, one without any is zeros. The last `padding` rows are
    each the mean of all rows before them. `own`: the model's row of each output token, whether it is taken or not.
    """

    sources: Mapping[str, Rows]
    own: Rows
    size: int
    padding: int = 0


@dataclass(frozen=True)
class TokenizerPlan:
    """`files`: every tokenizer file of the output by name; the donor's own where nothing changes.

    `donor`: the model whose tokenizer it is, or was before tokens were added. `size`: rows of the
    output's embedding; `picks`: a model's label -> the rows of its embedding;
    `special_ids`: `eos_token_id` and the like where they are not the first model's; `notes`: what a user should know.
    """

    donor: str
    files: Mapping[str, SideFile]
    size: int
    picks: Mapping[str, RowPicks]
    special_ids: Mapping[str, int]
    notes: tuple[str, ...]
