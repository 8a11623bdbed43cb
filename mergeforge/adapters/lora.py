"""The LoRA factors of one module, and the deltas of the base's tensors that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergeforge.adapters.deltas import AddTensor, DoraDelta, LoraDelta, WeightDelta
from mergeforge.adapters.expert_deltas import RowRangeDelta
from mergeforge.adapters.peft.kind import AdaptedModule
from mergeforge.adapters.peft.lora_config import LoraSettings
from mergeforge.adapters.peft.lora_variants import bdlora_formula, conv_formula, kasa_formula
from mergeforge.adapters.peft_delta import PeftDelta
from mergeforge.adapters.residual_init import ResidualInitDelta
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS
from mergeforge.errors import SourceError
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

FACTOR_ROLES = {"linear": ("A", "B"), "embedding": ("embedding_A", "embedding_B"), "mlx": ("mlx_A", "mlx_B")}
_OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, around which PEFT puts its own layer


@dataclass(frozen=True)
class LoraFactors:
    """A and B of one module, with the tensors that belong to them.

    `layout`: "linear" has A (r, in) and B (out, r), also for convolutions; "embedding" has (r, vocabulary) and
    (dim, r); "mlx" has (in, r) and (r, out).
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    layout: str = "linear"
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    middle: StoredTensor | None = None
    diagonal: StoredTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.info.shape[-1] if self.layout == "mlx" else self.a.info.shape[0]

    @property
    def delta_shape(self) -> tuple[int, int]:
        """(out, in) of B A; (dim, vocabulary) for an embedding."""
        if self.layout == "mlx":
            return self.b.info.shape[1], self.a.info.shape[0]
        return self.b.info.shape[0], self.a.info.shape[1]

    @property
    def is_plain(self) -> bool:
        return self.layout != "embedding" and not any((self.magnitude, self.bias, self.middle, self.diagonal))

    @property
    def are_matrices(self) -> bool:
        return len(self.a.info.shape) == len(self.b.info.shape) == 2

    @property
    def factors(self) -> dict[str, StoredTensor]:
        """The tensors by their roles in peft/lora_variants.py."""
        tensors = {"A": self.a, "B": self.b, "magnitude": self.magnitude, "middle": self.middle}
        return {role: tensor for role, tensor in tensors.items() if tensor is not None}


def take_factors(module: str, roles: dict[str, StoredTensor]) -> LoraFactors | None:
    """Remove a module's LoRA factors from `roles` and return them; None if there are none."""
    for layout, (a, b) in FACTOR_ROLES.items():
        if a in roles and b in roles:
            factor_a, factor_b = roles.pop(a), roles.pop(b)
            extras = [roles.pop(role, None) for role in ("magnitude", "B_bias", "middle", "diagonal")]
            return LoraFactors(module, factor_a, factor_b, layout, *extras)
    return None


def lora_deltas(
    pair: LoraFactors, settings: LoraSettings, resolver: TensorResolver
) -> tuple[list[tuple[str, WeightDelta]], list[str]]:
    """Return (tensor, delta) for every tensor that the factors change, and notes.

    Raises MatchError if they match no tensor or have the wrong shape, SourceError if they cannot be folded.
    """
    if deltas := _slice_deltas(pair, settings, resolver):
        return deltas, []
    path, scale, notes = _path_and_scale(pair, settings, resolver)
    name = resolver.require(path, pair.a)
    target = resolver.target(name)
    if not target.info.is_float:
        text = f"{resolver.label}: {name} of {resolver.base.label} is quantized ({target.info.dtype})"
        raise SourceError(text, hint="merge into the 16-bit version of the base")
    deltas = [(name, _weight_delta(pair, scale, target, settings, resolver))]
    if pair.bias is not None:
        deltas.append(_bias_delta(pair, pair.bias, scale, resolver))
    return deltas, notes


def _path_and_scale(
    pair: LoraFactors, settings: LoraSettings, resolver: TensorResolver
) -> tuple[str, float, list[str]]:
    """Return the path of the weight, the scale and notes.

    PEFT applies the delta of nn.MultiheadAttention's out_proj twice, in training and in its merge.
    """
    module, scale = pair.module, settings.scale(pair.module, pair.rank)
    if module.endswith(_OUT_PROJ):
        own = f"{module.removesuffix(_OUT_PROJ)}.out_proj"
        note = f"{resolver.label}: the delta of {own} is applied twice, as PEFT does in training"
        return f"{own}.weight", 2 * scale, [note]
    if not resolver.find(f"{module}.weight") and resolver.find(f"{module}.in_proj_weight"):
        return f"{module}.in_proj_weight", scale, []
    return f"{module}.weight", scale, []


def _weight_delta(
    pair: LoraFactors, scale: float, target: LazyTensor, settings: LoraSettings, resolver: TensorResolver
) -> WeightDelta:
    shape = tuple(target.info.shape)
    if settings.dora and pair.magnitude is None:
        text = f"{resolver.label}: {pair.module} has no lora_magnitude_vector, but the config sets use_dora"
        raise SourceError(text)
    if len(shape) == 2 and not pair.are_matrices and settings.scales is None:
        shapes = f"{list(pair.a.info.shape)} and {list(pair.b.info.shape)}"
        text = f"{resolver.label}: {pair.module}: factors of shapes {shapes} do not fit a linear layer"
        raise SourceError(text)
    if len(shape) > 2 or not pair.are_matrices or pair.middle is not None or settings.bdlora_blocks > 1:
        return _conv_or_bdlora_delta(pair, scale, target, settings, resolver)
    lora = _lora_delta(pair, scale, target, settings, resolver)
    if settings.residual_init or pair.diagonal is not None:
        return _residual_delta(pair, lora, target, settings, resolver)
    if pair.magnitude is None:
        return lora
    columns = _norms_over_columns(pair, lora, shape)
    if pair.magnitude.info.numel != shape[1 if columns else 0]:
        resolver.refuse_shape(pair.module, shape, pair.magnitude)
    return DoraDelta(lora, pair.magnitude, columns)


def _norms_over_columns(pair: LoraFactors, lora: LoraDelta, shape: tuple[int, ...]) -> bool:
    """Whether DoRA's norms are those of W's columns. MLX only has norms of rows; LyCORIS may have (1, in)."""
    assert pair.magnitude is not None
    over_inputs = pair.magnitude.info.shape == (1, shape[1])
    return over_inputs or (lora.transposed and pair.layout != "mlx")


def _lora_delta(
    pair: LoraFactors, scale: float, target: LazyTensor, settings: LoraSettings, resolver: TensorResolver
) -> LoraDelta:
    """s * L R of a matrix; its shape tells whether it is stored transposed."""
    shape = tuple(target.info.shape)
    delta_shape = pair.delta_shape
    if pair.layout == "mlx":
        embedding_shape = (pair.a.info.shape[0], pair.b.info.shape[1])  # for an embedding, A has a row per token
        if embedding_shape == shape and (delta_shape != shape or pair.module.rpartition(".")[2] in EMBEDDINGS):
            return LoraDelta(pair.a, pair.b, False, scale)
        transposed = False
    else:
        transposed = pair.layout == "embedding" or _is_transposed(shape, delta_shape, pair.module, settings, resolver)
    if shape != (delta_shape[::-1] if transposed else delta_shape):
        resolver.refuse_shape(pair.module, delta_shape[::-1] if transposed else delta_shape, target)
    if pair.layout == "mlx":
        return LoraDelta(pair.b, pair.a, True, scale)
    return LoraDelta(pair.a, pair.b, True, scale) if transposed else LoraDelta(pair.b, pair.a, False, scale)


def _is_transposed(
    shape: tuple[int, ...], delta_shape: tuple[int, int], module: str, settings: LoraSettings, resolver: TensorResolver
) -> bool:
    """Whether W is stored (in, out), by its shape; for a square W, by the config or the model."""
    if delta_shape[0] != delta_shape[1]:
        return shape == delta_shape[::-1] and shape != delta_shape
    in_conv1d = resolver.base.config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] not in HEADS
    return settings.fan_in_fan_out or in_conv1d


def _residual_delta(
    pair: LoraFactors, lora: LoraDelta, target: LazyTensor, settings: LoraSettings, resolver: TensorResolver
) -> WeightDelta:
    """Subtract what the initialization took, too. In PEFT, embeddings have no such initialization: a plain delta."""
    if pair.layout == "embedding" and pair.diagonal is None:
        return lora
    where, init, shape = f"{resolver.label}: {pair.module}", settings.residual_init, target.info.shape
    diagonal_size = pair.diagonal.info.numel if pair.diagonal else 0
    if diagonal_size != (lora.rank if init in ("kasa", "truncated") else 0) or pair.magnitude is not None:
        text = f"{where} has rank {lora.rank}, but a lora_diag of {diagonal_size} values, or a DoRA magnitude"
        raise SourceError(text, hint="this adapter_config.json is not for these tensors")
    if lora.transposed and init != "pissa":
        text = f"{where} is stored transposed (Conv1D), where a {init} initialization cannot be computed again"
        raise SourceError(text, hint="fold it into the base that was saved with it and set base_is_residual: true")
    if init == "truncated" and pair.diagonal is not None:
        return PeftDelta(kasa_formula(lora.scale), {**pair.factors, "diagonal": pair.diagonal}, target)
    if lora.rank >= min(shape):
        raise SourceError(f"{where}: its initialization subtracts all {min(shape)} singular directions")
    return ResidualInitDelta(lora, init, (shape[0], shape[1]), pair.diagonal)


def _conv_or_bdlora_delta(
    pair: LoraFactors, scale: float, target: LazyTensor, settings: LoraSettings, resolver: TensorResolver
) -> WeightDelta:
    """The delta of a convolution, or of block-diagonal factors."""
    shape = tuple(target.info.shape)
    module = AdaptedModule(pair.module, {role: tensor.info.shape for role, tensor in pair.factors.items()}, shape)
    where = f"{resolver.label}: {pair.module}"
    if pair.layout != "linear" or settings.residual_init or pair.diagonal is not None:
        shapes = list(module.shapes.values())
        raise SourceError(f"{where}: its initialization or layout is not supported for factors of shapes {shapes}")
    try:
        if settings.bdlora_blocks > 1 and len(shape) == 2 and pair.are_matrices:
            if pair.magnitude is not None or settings.fan_in_fan_out:
                raise ValueError(f"{pair.module}: block-diagonal factors with DoRA or Conv1D are not supported")
            formula = bdlora_formula(module, scale, settings.bdlora_blocks)
        else:
            formula = conv_formula(module, scale)
    except ValueError as error:
        raise SourceError(f"{resolver.label}: {error}") from None
    return PeftDelta(formula, pair.factors, target, shape[1] if len(shape) == 3 else 1)


def _bias_delta(
    pair: LoraFactors, bias: StoredTensor, scale: float, resolver: TensorResolver
) -> tuple[str, WeightDelta]:
    name = resolver.find(f"{pair.module}.bias")
    if not name:
        text = (
            f"{resolver.label}: {bias.info.name!r} changes a bias, but {pair.module} of {resolver.base.label} has none"
        )
        raise SourceError(text, hint="PEFT cannot merge it either; train without lora_bias, or on a base with biases")
    resolver.check_same_shape(pair.module, bias, resolver.target(name))
    return name, AddTensor(bias, scale)


def _slice_deltas(pair: LoraFactors, settings: LoraSettings, resolver: TensorResolver) -> list[tuple[str, WeightDelta]]:
    """Deltas of the stored tensors that hold the module's weight in pieces, or as a piece; none if it is stored whole.

    A loaded weight may be concatenated from stored ones, or split from one; an expert may be in a stack.
    """
    slices = resolver.slices(f"{pair.module}.weight")
    special = settings.residual_init or settings.bdlora_blocks > 1 or pair.layout != "linear" or not pair.are_matrices
    if slices and (special or not pair.is_plain):
        text = f"{resolver.label}: {pair.module} is stored in pieces or inside a fused tensor"
        raise SourceError(f"{text}; only plain LoRA can be folded into it")
    scale = settings.scale(pair.module, pair.rank)
    rows = sum(piece.rows for piece in slices)
    deltas: list[tuple[str, WeightDelta]] = []
    for piece in slices:
        stored = resolver.base.tensors[piece.name]
        if (rows, stored.info.columns) != pair.delta_shape:
            resolver.refuse_shape(pair.module, pair.delta_shape, stored)
        lora = LoraDelta(_row_range(pair.b, piece.loaded_start, piece.rows), pair.a, False, scale)
        whole = piece.stored_start == 0 and piece.rows == stored.info.rows
        deltas.append((piece.name, lora if whole else RowRangeDelta(lora, piece.stored_start, piece.rows)))
    return deltas


def check_rank(pair: LoraFactors, settings: LoraSettings, label: str) -> None:
    """Raises SourceError if the ranks of A, B and the config differ."""
    shapes = [pair.a.info.shape, pair.b.info.shape]
    if min(map(len, shapes)) < 2:
        text = f"{label}: {pair.module}: factors of shapes {list(shapes[0])} and {list(shapes[1])} are not matrices"
        raise SourceError(text)
    rank, config_ranks = pair.rank, settings.ranks_of(pair.module)
    rank_of_b = pair.b.info.shape[0 if pair.layout == "mlx" else 1]
    if rank_of_b != rank and settings.bdlora_blocks == 1 and pair.are_matrices:
        raise SourceError(f"{label}: {pair.module}: A has rank {rank}, B has rank {rank_of_b}")
    if settings.rank and rank not in config_ranks:
        text = f"{label}: {pair.module}: its tensors have rank {rank}, but its config says {config_ranks[0]}"
        raise SourceError(text, hint="this adapter_config.json is not for these tensors")


def _row_range(stored: StoredTensor, first: int, rows: int) -> StoredTensor:
    """Rows [first, first + rows) of a matrix, as a tensor."""
    info = replace(stored.info, shape=(rows, *stored.info.shape[1:]))
    return StoredTensor(info, stored.file, stored.offset + first * stored.info.row_nbytes)
