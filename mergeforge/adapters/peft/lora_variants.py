"""LoRA whose factors are not two plain matrices: of convolutions, or in blocks.

Each answers with a formula over the factors "A", "B" and, with DoRA, "magnitude", as kinds.py has them, or
raises ValueError with the reason why there is none. W is (out, in), a convolution's (out, in, *kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import Delta, Formula, Module, Prepare, low_rank

if TYPE_CHECKING:
    from torch import Tensor

Pair = Callable[[Mapping[str, "Tensor"]], tuple["Tensor", "Tensor"]]


def convolution(module: Module, scale: float) -> Formula:
    """W + s * B A, with A (r, in, *kernel) and B (out, r, 1, ...) as the matrices (r, in * kernel) and (out, r).

    With a core M ("middle", (r, r, *kernel)), A and B have kernels of 1: W + s * B M A. With a magnitude it is
    DoRA, whose norms are over each output's weights (peft/tuners/lora/layer.py, _ConvNd; kohya's lora_mid).
    """
    rank = module.require("A")[0]
    _check_groups(module, rank)
    core = module.shapes.get("middle")
    inside = module.inside if core is None else module.weight[1]
    for role, size in (("A", rank * inside), ("B", module.outside * rank)):
        if prod(module.require(role)) != size:
            raise ValueError(_unfit(module, role))
    if core is not None and core != (rank, rank, *module.weight[2:]):
        raise ValueError(_unfit(module, "middle"))
    if core is None and len(module.shapes["A"]) == len(module.weight) and module.shapes["A"][1:] != module.weight[1:]:
        raise ValueError(_unfit(module, "A"))

    def factors(given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        right = given["A"].reshape(rank, -1)
        if "middle" in given:
            spread = given["middle"].reshape(rank, rank, -1).transpose(1, 2) @ right  # (r, kernel, in)
            right = spread.transpose(1, 2).reshape(rank, -1)
        return given["B"].reshape(-1, rank) * scale, right

    held = 12 * rank * module.inside if core is not None else 0
    return _formula(module, factors, scale, held)


def in_blocks(module: Module, scale: float, count: int) -> Formula:
    """W + s * B A where one of the factors is block-diagonal, and stored as its blocks one on the other.

    BD-LoRA: B (out, r / count), or A (r, in / count) (peft/tuners/lora/variants.py, BdLoraLinearVariant).
    """
    rank = module.require("A", None, None)[0]
    sizes = (module.shapes["A"], module.require("B", module.outside, None))
    whole = ((rank, module.inside), (module.outside, rank))
    left = sizes == (whole[0], (module.outside, rank // count)) and rank % count == module.outside % count == 0
    right = sizes == ((rank, module.inside // count), whole[1]) and rank % count == module.inside % count == 0
    if sizes != whole and not left and not right:
        raise ValueError(_unfit(module, "A"))

    def prepare(given: Mapping[str, Tensor]) -> Delta:
        import torch

        a, b = given["A"], given["B"] * scale
        if sizes == whole:
            return low_rank(b, a)
        blocks: Tensor = torch.block_diag(*(b if left else a).chunk(count))  # type: ignore[no-untyped-call]
        return low_rank(blocks, a) if left else low_rank(b, blocks)

    held = 4 * rank * (module.outside + module.inside)
    return Formula("BD-LoRA", prepare, fixed=held, facts={"scale": scale})


def with_diagonal(scale: float) -> Formula:
    """W + s * B diag(d) A: KaSA on a base whose smallest singular values are gone already."""

    def prepare(given: Mapping[str, Tensor]) -> Delta:
        return low_rank(given["B"] * (given["diagonal"].flatten() * scale), given["A"])

    return Formula("KaSA", prepare, facts={"scale": scale})


def _formula(module: Module, factors: Pair, scale: float, held: int) -> Formula:
    if "magnitude" not in module.shapes:
        return Formula("LoRA", lambda given: low_rank(*factors(given)), fixed=held, facts={"scale": scale})
    if prod(module.shapes["magnitude"]) != module.outside or module.shapes["magnitude"][0] not in (1, module.outside):
        raise ValueError(_unfit(module, "magnitude"))
    return Formula("DoRA", dora(factors), needs_base=True, fixed=held, live=3, facts={"scale": scale})


def dora(factors: Pair) -> Prepare:
    """m / |V| * V - W with V = W + L R, the norm taken over each of V's rows (peft/tuners/lora/dora.py)."""

    def prepare(given: Mapping[str, Tensor]) -> Delta:
        left, right = factors(given)
        magnitude = given["magnitude"].reshape(-1, 1)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = base.addmm(left[start:stop], right)
            return value.mul_(magnitude[start:stop] / value.norm(dim=1, keepdim=True)).sub_(base)

        return delta

    return prepare


def _check_groups(module: Module, rank: int) -> None:
    """PEFT's lora_A sees all the channels of a grouped convolution, each of whose outputs sees its group's alone."""
    a, b = module.shapes["A"], module.require("B")
    groups = a[1] // module.weight[1] if len(a) == len(module.weight) > 2 else 1
    if groups > 1 and a[1] == groups * module.weight[1] and b[1] * groups == rank:
        reason = f"is a convolution in {groups} groups, and its lora_A mixes their channels"
        raise ValueError(f"{module.path} {reason}: no weight of the base's shape does that")


def _unfit(module: Module, role: str) -> str:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in module.shapes.items())
    return f"{module.path}: {role} of {shapes} does not fit its weight {list(module.weight)}"
