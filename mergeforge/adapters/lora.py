"""A pair of LoRA factors and what belongs to it, turned into edits of the base's tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergeforge.adapters.deltas import AddTensor, DoraDelta, LoraDelta, WeightDelta
from mergeforge.adapters.expert_deltas import RowRangeDelta
from mergeforge.adapters.peft.kind import Module
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.adapters.peft.lora_variants import convolution, in_blocks, with_diagonal
from mergeforge.adapters.peft_delta import PeftDelta
from mergeforge.adapters.residual_init import ResidualInitDelta
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS
from mergeforge.errors import SourceError
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

PAIRS = {"linear": ("A", "B"), "embedding": ("embedding_A", "embedding_B"), "turned": ("turned_A", "turned_B")}
_OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, which PEFT wraps in a layer of its own


@dataclass(frozen=True)
class Pair:
    """A and B of one module. `kind`: A (r, in) and B (out, r) of a linear layer or convolution; of an embedding
    (r, vocabulary) and (dim, r); "turned", as MLX has them, (in, r) and (r, out).
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    kind: str = "linear"
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    middle: StoredTensor | None = None
    diagonal: StoredTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.info.shape[-1] if self.kind == "turned" else self.a.info.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of B A; an embedding's (dim, vocabulary)."""
        if self.kind == "turned":
            return self.b.info.shape[1], self.a.info.shape[0]
        return self.b.info.shape[0], self.a.info.shape[1]

    @property
    def is_plain(self) -> bool:
        return self.kind != "embedding" and not any((self.magnitude, self.bias, self.middle, self.diagonal))

    @property
    def is_matrices(self) -> bool:
        return len(self.a.info.shape) == len(self.b.info.shape) == 2

    @property
    def factors(self) -> dict[str, StoredTensor]:
        """By their roles in adapters/variants.py."""
        found = {"A": self.a, "B": self.b, "magnitude": self.magnitude, "middle": self.middle}
        return {role: one for role, one in found.items() if one is not None}


def take_pair(module: str, roles: dict[str, StoredTensor]) -> Pair | None:
    """Take a pair and what belongs to it out of a module's tensors; None where there is no pair."""
    for kind, (a, b) in PAIRS.items():
        if a in roles and b in roles:
            first, second = roles.pop(a), roles.pop(b)
            more = [roles.pop(role, None) for role in ("magnitude", "B_bias", "middle", "diagonal")]
            return Pair(module, first, second, kind, *more)
    return None


def low_rank_edits(
    pair: Pair, settings: LoraSettings, homes: TensorResolver
) -> tuple[list[tuple[str, WeightDelta]], list[str]]:
    """(tensor, edit) for what a pair does to the base, and notes.

    Raises Misfit for a pair without a home or of the wrong shape, SourceError for one that cannot be folded.
    """
    if edits := _in_parts(pair, settings, homes):
        return edits, []
    path, scale, notes = _path_and_scale(pair, settings, homes)
    name = homes.name(path, pair.a)
    target = homes.target(name)
    if not target.info.is_float:
        hint = "merge into the 16-bit version of the base"
        text = f"{homes.label}: {name} of {homes.base.label} is {target.info.dtype}: quantised"
        raise SourceError(text, hint=hint)
    edits = [(name, _weight_edit(pair, scale, target, settings, homes))]
    if pair.bias is not None:
        edits.append(_bias_edit(pair, pair.bias, scale, homes))
    return edits, notes


def _path_and_scale(pair: Pair, settings: LoraSettings, homes: TensorResolver) -> tuple[str, float, list[str]]:
    """The path of the weight and the scale.

    PEFT applies the change of nn.MultiheadAttention's out_proj twice, when it trains as when it merges.
    """
    module, scale = pair.module, settings.scale(pair.module, pair.rank)
    if module.endswith(_OUT_PROJ):
        own = f"{module.removesuffix(_OUT_PROJ)}.out_proj"
        return f"{own}.weight", 2 * scale, [f"{homes.label}: {own} takes its change twice, as PEFT trains it"]
    if not homes.find(f"{module}.weight") and homes.find(f"{module}.in_proj_weight"):
        return f"{module}.in_proj_weight", scale, []
    return f"{module}.weight", scale, []


def _weight_edit(pair: Pair, scale: float, target: LazyTensor, settings: LoraSettings, homes: TensorResolver) -> WeightDelta:
    shape = tuple(target.info.shape)
    if settings.dora and pair.magnitude is None:
        text = f"{homes.label}: {pair.module} lacks its lora_magnitude_vector, though use_dora is set"
        raise SourceError(text)
    if len(shape) == 2 and not pair.is_matrices and settings.scales is None:
        shapes = f"{list(pair.a.info.shape)} and {list(pair.b.info.shape)}"
        text = f"{homes.label}: {pair.module}: factors of shapes {shapes} are not those of a linear layer"
        raise SourceError(text)
    if len(shape) > 2 or not pair.is_matrices or pair.middle is not None or settings.blocks > 1:
        return _formulated(pair, scale, target, settings, homes)
    low = _low_rank(pair, scale, target, settings, homes)
    if settings.start or pair.diagonal is not None:
        return _residual(pair, low, target, settings, homes)
    if pair.magnitude is None:
        return low
    columns = _by_columns(pair, low, shape)
    if pair.magnitude.info.numel != shape[1 if columns else 0]:
        homes.refuse_shape(pair.module, shape, pair.magnitude)
    return DoraDelta(low, pair.magnitude, columns)


def _by_columns(pair: Pair, low: LoraDelta, shape: tuple[int, ...]) -> bool:
    """Whether DoRA's norms are those of W's columns: MLX has rows' alone, LyCORIS may have (1, in)."""
    assert pair.magnitude is not None
    over_inputs = pair.magnitude.info.shape == (1, shape[1])
    return over_inputs or (low.transposed and pair.kind != "turned")


def _low_rank(pair: Pair, scale: float, target: LazyTensor, settings: LoraSettings, homes: TensorResolver) -> LoraDelta:
    """s * L R of a matrix, told by its shape which way round it is stored."""
    shape = tuple(target.info.shape)
    outside = pair.sizes
    if pair.kind == "turned":
        table = (pair.a.info.shape[0], pair.b.info.shape[1])  # an embedding, whose rows A's are
        if table == shape and (outside != shape or pair.module.rpartition(".")[2] in EMBEDDINGS):
            return LoraDelta(pair.a, pair.b, False, scale)
        transposed = False
    else:
        transposed = pair.kind == "embedding" or _is_transposed(shape, outside, pair.module, settings, homes)
    if shape != (outside[::-1] if transposed else outside):
        homes.refuse_shape(pair.module, outside[::-1] if transposed else outside, target)
    if pair.kind == "turned":
        return LoraDelta(pair.b, pair.a, True, scale)
    return LoraDelta(pair.a, pair.b, True, scale) if transposed else LoraDelta(pair.b, pair.a, False, scale)


def _is_transposed(
    shape: tuple[int, ...], outside: tuple[int, int], module: str, settings: LoraSettings, homes: TensorResolver
) -> bool:
    """Whether W is stored (in, out): told by its shape; a square W by the config or the model."""
    if outside[0] != outside[1]:
        return shape == outside[::-1] and shape != outside
    in_conv1d = homes.base.config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] not in HEADS
    return settings.fan_in_fan_out or in_conv1d


def _residual(pair: Pair, low: LoraDelta, target: LazyTensor, settings: LoraSettings, homes: TensorResolver) -> WeightDelta:
    """The start's part taken out, too. Embeddings have no such start in PEFT: theirs is plain."""
    if pair.kind == "embedding" and pair.diagonal is None:
        return low
    about, start, shape = f"{homes.label}: {pair.module}", settings.start, target.info.shape
    held = pair.diagonal.info.numel if pair.diagonal else 0
    if held != (low.rank if start in ("kasa", "truncated") else 0) or pair.magnitude is not None:
        text = f"{about} has a lora_diag of {held} numbers beside rank {low.rank}, or a magnitude"
        raise SourceError(text, hint="adapter_config.json does not belong to these tensors")
    if low.transposed and start != "pissa":
        text = f"{about} is stored transposed (Conv1D), where {start} cannot be undone"
        raise SourceError(text, hint="fold it into the base that was saved with it: base_is_residual: true")
    if start == "truncated" and pair.diagonal is not None:
        return PeftDelta(with_diagonal(low.scale), {**pair.factors, "diagonal": pair.diagonal}, target)
    if low.rank >= min(shape):
        raise SourceError(f"{about}: its start takes out all {min(shape)} directions")
    return ResidualInitDelta(low, start, (shape[0], shape[1]), pair.diagonal)


def _formulated(pair: Pair, scale: float, target: LazyTensor, settings: LoraSettings, homes: TensorResolver) -> WeightDelta:
    """Convolutions and block-diagonal factors."""
    shape = tuple(target.info.shape)
    module = Module(pair.module, {role: one.info.shape for role, one in pair.factors.items()}, shape)
    about = f"{homes.label}: {pair.module}"
    if pair.kind != "linear" or settings.start or pair.diagonal is not None:
        raise SourceError(f"{about}: its start or layout is not supported beside shapes {list(module.shapes.values())}")
    try:
        if settings.blocks > 1 and len(shape) == 2 and pair.is_matrices:
            if pair.magnitude is not None or settings.fan_in_fan_out:
                raise ValueError(f"{pair.module}: block-diagonal factors are not supported with DoRA or Conv1D")
            formula = in_blocks(module, scale, settings.blocks)
        else:
            formula = convolution(module, scale)
    except ValueError as error:
        raise SourceError(f"{homes.label}: {error}") from None
    return PeftDelta(formula, pair.factors, target, shape[1] if len(shape) == 3 else 1)


def _bias_edit(pair: Pair, bias: StoredTensor, scale: float, homes: TensorResolver) -> tuple[str, WeightDelta]:
    name = homes.find(f"{pair.module}.bias")
    if not name:
        text = f"{homes.label}: {bias.info.name!r} is added to a bias, and {pair.module} of {homes.base.label} has none"
        raise SourceError(text, hint="PEFT cannot merge it either: train without lora_bias, or on a base with biases")
    homes.check_same_shape(pair.module, bias, homes.target(name))
    return name, AddTensor(bias, scale)


def _in_parts(pair: Pair, settings: LoraSettings, homes: TensorResolver) -> list[tuple[str, WeightDelta]]:
    """Edits of the stored tensors that the module's weight is made of, or is a part of; none where it is one of them.

    A loaded weight may be joined of stored ones, or cut out of one; an expert on its own may lie in a stack.
    """
    parts = homes.parts(f"{pair.module}.weight")
    special = settings.start or settings.blocks > 1 or pair.kind != "linear" or not pair.is_matrices
    if parts and (special or not pair.is_plain):
        raise SourceError(f"{homes.label}: {pair.module} lies in parts, where only plain LoRA can be folded")
    scale = settings.scale(pair.module, pair.rank)
    rows = sum(part.rows for part in parts)
    edits: list[tuple[str, WeightDelta]] = []
    for part in parts:
        stored = homes.base.tensors[part.name]
        if (rows, stored.info.columns) != pair.sizes:
            homes.refuse_shape(pair.module, pair.sizes, stored)
        low = LoraDelta(_rows_of(pair.b, part.first, part.rows), pair.a, False, scale)
        whole = part.start == 0 and part.rows == stored.info.rows
        edits.append((part.name, low if whole else RowRangeDelta(low, part.start, part.rows)))
    return edits


def check_rank(pair: Pair, settings: LoraSettings, label: str) -> None:
    """Raises SourceError where the factors' ranks differ from one another or from the config's."""
    shapes = [pair.a.info.shape, pair.b.info.shape]
    if min(map(len, shapes)) < 2:
        text = f"{label}: {pair.module}: factors of shapes {list(shapes[0])} and {list(shapes[1])} are no matrices"
        raise SourceError(text)
    rank, wanted = pair.rank, settings.ranks_of(pair.module)
    other = pair.b.info.shape[0 if pair.kind == "turned" else 1]
    if other != rank and settings.blocks == 1 and pair.is_matrices:
        raise SourceError(f"{label}: {pair.module}: A has rank {rank}, B has rank {other}")
    if settings.rank and rank not in wanted:
        hint = "adapter_config.json does not belong to these tensors"
        text = f"{label}: {pair.module}: its tensors have rank {rank}, its config says {wanted[0]}"
        raise SourceError(text, hint=hint)


def _rows_of(stored: StoredTensor, first: int, rows: int) -> StoredTensor:
    """Rows [first, first + rows) of a matrix as a tensor of their own."""
    info = replace(stored.info, shape=(rows, *stored.info.shape[1:]))
    return StoredTensor(info, stored.file, stored.offset + first * stored.info.row_nbytes)
