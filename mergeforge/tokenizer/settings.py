"""The tokenizer settings of a recipe, and the plan made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.io.aux_files import AuxFile, AuxFiles

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
    """An entry of `tokenizer.tokens`: the row of a token in models that lack it; with `force`, in all models.

    `source`: a model's label (its row of the same token), a ModelToken, Zero, or None: the default for any token.
    """

    source: str | ModelToken | Zero | None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """`source`: union, base or a model's label. `tokens`: settings of single tokens; new tokens are added."""

    source: str = "union"
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class ModelTokenizer:
    """A model: its label, the files beside its weights by name, the rows of its embedding.

    `merged`: its weights are merged. Otherwise the recipe names it only for its tokenizer or for single rows,
    and other tokens never take its rows.
    """

    label: str
    files: AuxFiles
    rows: int
    merged: bool = True


@dataclass(frozen=True, eq=False)
class RowSources:
    """The rows that make up a model's embedding (or head) for the output's tokenizer.

    `sources`: a model's label -> the row of its tensor for each output row, -1 where none.
    An output row with several sources is their mean; one without any is zero. Each of the last `padding` rows is
    the mean of all rows before them. `own`: the model's row of each output token, whether it is used or not.
    """

    sources: Mapping[str, Rows]
    own: Rows
    size: int
    padding: int = 0


@dataclass(frozen=True)
class TokenizerPlan:
    """The output's tokenizer.

    `source_model`: the model whose tokenizer it is, or was before tokens were added. `files`: every tokenizer file of
    the output by name; unchanged files are the source model's own. `size`: rows of the output's embedding.
    `row_sources`: a model's label -> the rows of its embedding. `special_ids`: `eos_token_id` and the like where they
    differ from the first model's. `notes`: messages for the user.
    """

    source_model: str
    files: Mapping[str, AuxFile]
    size: int
    row_sources: Mapping[str, RowSources]
    special_ids: Mapping[str, int]
    notes: tuple[str, ...]
