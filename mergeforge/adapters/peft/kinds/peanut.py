"""PEANuT: a small network computes the change from the weight itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter, low_rank

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "r depth act_fn scaling"
_ACTIVATIONS = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "linear", "mish", "relu6", "relu2")


@adapter("PEANUT", prefixes=("peanut_",), fields=_FIELDS)
def peanut(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + s * B net(A W)^T: an autoencoder with residuals maps each column of A W (peft/tuners/peanut/layer.py).

    The network sees r numbers per column of W, so A W is a statistic, and the change has rank r.
    """
    rank = module.require("peanut_A", None, module.out_features)[0]
    module.require("peanut_B", module.out_features, rank)
    name = str(config.get("act_fn", "relu"))
    if name not in _ACTIVATIONS:
        raise ValueError(f"{module.path}: its config sets act_fn: {name}, and this version does not know that function")
    depth = int(config.get("depth", 0))
    for at in range(depth):
        module.require(f"peanut_encoders.{at}", rank, rank)
        module.require(f"peanut_decoders.{at}", rank, rank)
    scale = float(config.get("scaling", 1.0))

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        product = factors["peanut_A"].new_zeros(rank, module.in_features)
        for start, rows in weight():
            product.addmm_(factors["peanut_A"][:, start : start + len(rows)], rows)
        return {"input": product}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        hidden = _network(factors, factors["input"].t(), depth, name)
        return low_rank(factors["peanut_B"] * scale, hidden.t())

    nbytes = 4 * rank * (module.out_features + (4 + depth) * module.in_features)
    return {"weight": Formula("PEANuT", prepare, scratch_nbytes=nbytes, details={"scale": scale}, statistic=statistic)}


def _network(factors: Mapping[str, Tensor], value: Tensor, depth: int, activation: str) -> Tensor:
    """(in, r) -> (in, r): encoders, then decoders, each of which adds the encoder's input on its level."""
    value, levels = _activate(value, activation), []
    for at in range(depth):
        levels.append(value)
        value = _activate(value @ factors[f"peanut_encoders.{at}"].t(), activation)
    for at in range(depth):
        value = _activate(value @ factors[f"peanut_decoders.{at}"].t(), activation) + levels[depth - 1 - at]
    return value


def _activate(value: Tensor, name: str) -> Tensor:
    """An activation of transformers (activations.ACT2FN)."""
    from torch.nn import functional

    if name == "linear":
        return value
    if name == "relu2":
        return functional.relu(value).square()
    names = {"swish": "silu"}
    result: Tensor = getattr(functional, names.get(name, name))(value)
    return result
