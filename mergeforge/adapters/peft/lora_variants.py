"""LoRA whose factors are not two plain matrices: on convolutions, block-diagonal, or with a diagonal.

Each function returns a formula (kind.py) over the factors "A", "B" and, with DoRA, "magnitude", or raises
ValueError with the reason why there is none. W is (out, in), or (out, in, *kernel) for a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Delta, Formula, Prepare, low_rank

if TYPE_CHECKING:
    from torch import Tensor

FactorPair = Callable[[Mapping[str, "Tensor"]], tuple["Tensor", "Tensor"]]


def conv_formula(module: AdaptedModule, scale: float) -> Formula:
    """W + s * B A, with A (r, in, *kernel) and B (out, r, 1, ...) as the matrices (r, in * kernel) and (out, r).

    With a core M ("middle", (r, r, *kernel)), A and B have kernels of size 1: W + s * B M A. With a magnitude it
    is DoRA with a norm per output (peft/tuners/lora/layer.py, _ConvNd; kohya's lora_mid).
    """
    rank = module.require("A")[0]
    _check_groups(module, rank)
    core = module.shapes.get("middle")
    inputs = module.in_features if core is None else module.weight[1]
    for role, size in (("A", rank * inputs), ("B", module.out_features * rank)):
        if prod(module.require(role)) != size:
            raise ValueError(_shape_error(module, role))
    if core is not None and core != (rank, rank, *module.weight[2:]):
        raise ValueError(_shape_error(module, "middle"))
    if core is None and len(module.shapes["A"]) == len(module.weight) and module.shapes["A"][1:] != module.weight[1:]:
        raise ValueError(_shape_error(module, "A"))

    def matrices(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        right = factors["A"].reshape(rank, -1)
        if "middle" in factors:
            by_position = factors["middle"].reshape(rank, rank, -1).transpose(1, 2) @ right  # (r, kernel, in)
            right = by_position.transpose(1, 2).reshape(rank, -1)
        return factors["B"].reshape(-1, rank) * scale, right

    nbytes = 12 * rank * module.in_features if core is not None else 0
    return _formula(module, matrices, scale, nbytes)


def bdlora_formula(module: AdaptedModule, scale: float, count: int) -> Formula:
    """W + s * B A where one factor is block-diagonal and stored as its blocks below one another.

    BD-LoRA: B is (out, r / count), or A is (r, in / count) (peft/tuners/lora/variants.py, BdLoraLinearVariant).
    """
    rank = module.require("A", None, None)[0]
    sizes = (module.shapes["A"], module.require("B", module.out_features, None))
    whole = ((rank, module.in_features), (module.out_features, rank))
    left = (
        sizes == (whole[0], (module.out_features, rank // count)) and rank % count == module.out_features % count == 0
    )
    right = sizes == ((rank, module.in_features // count), whole[1]) and rank % count == module.in_features % count == 0
    if sizes != whole and not left and not right:
        raise ValueError(_shape_error(module, "A"))

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        a, b = factors["A"], factors["B"] * scale
        if sizes == whole:
            return low_rank(b, a)
        blocks: Tensor = torch.block_diag(*(b if left else a).chunk(count))  # type: ignore[no-untyped-call]
        return low_rank(blocks, a) if left else low_rank(b, blocks)

    nbytes = 4 * rank * (module.out_features + module.in_features)
    return Formula("BD-LoRA", prepare, scratch_nbytes=nbytes, details={"scale": scale})


def kasa_formula(scale: float) -> Formula:
    """W + s * B diag(d) A: KaSA on a base whose smallest singular values were already removed."""

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        return low_rank(factors["B"] * (factors["diagonal"].flatten() * scale), factors["A"])

    return Formula("KaSA", prepare, details={"scale": scale})


def _formula(module: AdaptedModule, matrices: FactorPair, scale: float, nbytes: int) -> Formula:
    if "magnitude" not in module.shapes:
        return Formula(
            "LoRA", lambda factors: low_rank(*matrices(factors)), scratch_nbytes=nbytes, details={"scale": scale}
        )
    if prod(module.shapes["magnitude"]) != module.out_features or module.shapes["magnitude"][0] not in (
        1,
        module.out_features,
    ):
        raise ValueError(_shape_error(module, "magnitude"))
    return Formula(
        "DoRA", dora_delta(matrices), needs_base=True, scratch_nbytes=nbytes, scratch_blocks=3, details={"scale": scale}
    )


def dora_delta(matrices: FactorPair) -> Prepare:
    """m / |V| * V - W with V = W + L R and the norm of each row of V (peft/tuners/lora/dora.py)."""

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        left, right = matrices(factors)
        magnitude = factors["magnitude"].reshape(-1, 1)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = base.addmm(left[start:stop], right)
            return value.mul_(magnitude[start:stop] / value.norm(dim=1, keepdim=True)).sub_(base)

        return delta

    return prepare


def _check_groups(module: AdaptedModule, rank: int) -> None:
    """Raises ValueError for a grouped convolution: PEFT's lora_A mixes all channels, the base's kernel one group's."""
    a, b = module.shapes["A"], module.require("B")
    groups = a[1] // module.weight[1] if len(a) == len(module.weight) > 2 else 1
    if groups > 1 and a[1] == groups * module.weight[1] and b[1] * groups == rank:
        reason = f"is a convolution with {groups} groups, and its lora_A mixes the channels of all groups"
        raise ValueError(f"{module.path} {reason}; no weight of the base's shape can do that")


def _shape_error(module: AdaptedModule, role: str) -> str:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in module.shapes.items())
    return f"{module.path}: {role} does not fit its weight {list(module.weight)} (factors: {shapes})"
