"""FRoD: the weight in a basis that all layers of one kind share, with a sparse matrix in its middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, WeightPass, adapter

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = "projection_prng_key save_projection frod_dropout fan_in_fan_out bias sparse_rate regularization_alpha"
_FIELDS += " progressbar runtime_offload_base_weight"
_TINY = 1e-12  # columns of W V^-T with a smaller norm are zero in U


@adapter("FROD", prefixes=("frod_",), fields=_FIELDS, may_be_empty=True)
def frod(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """U (S + diag(l)) V^T, where U is W V^-T with columns of norm 1 (peft/tuners/frod/layer.py, get_delta_weight).

    Hence W' = W M with M = V^-T diag(1 / norms) (S + diag(l)) V^T, and only the norms take a pass over W. The file
    must hold V and the places of S. PEFT would compute them from all layers of the kind, but the signs of V's columns,
    which decide what S means, are then accidental: with 2 threads instead of 1, 19 of 1024 are others.
    """
    kind = _kind_of(module.path)
    roles = {name: f"frod_{name}.{kind}" for name in ("V", "s_indices")}
    size = module.in_features
    if roles["V"] not in module.shapes:
        raise ValueError(
            "its file does not contain the projections (V). PEFT computes them from the base again, but with signs "
            "that depend on the machine and the number of threads; save it with save_projection=True"
        )
    module.require(roles["V"], size, size)
    module.require("frod_lambda_l", size)
    (count,) = module.require("frod_lambda_s_values", None)
    module.require(roles["s_indices"], 2, count)

    def statistic(factors: Mapping[str, Tensor], weight: WeightPass) -> Mapping[str, Tensor]:
        import torch

        v = factors[roles["V"]].double().cpu()
        try:
            inverse = torch.linalg.solve(v, torch.eye(size, dtype=v.dtype)).t()
        except RuntimeError:
            inverse = torch.linalg.pinv(v, rtol=1e-6).t()
        squares = torch.zeros(size, dtype=torch.float64)
        for _, rows in weight():
            squares += (rows.double().cpu() @ inverse).square_().sum(0)
        norms = squares.sqrt()
        inverse *= torch.where(norms > _TINY, 1 / norms, 0.0)
        middle = torch.diag(factors["frod_lambda_l"].double().cpu())
        row, column = factors[roles["s_indices"]].long().cpu()
        middle.index_put_((row, column), factors["frod_lambda_s_values"].double().cpu(), accumulate=True)
        return {"M": inverse @ (middle @ v.t())}

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        return lambda start, stop, base: (base.double().cpu() @ factors["M"]).to(base).sub_(base)

    return {"weight": Formula("FRoD", prepare, needs_base=True, scratch_nbytes=48 * size * size, statistic=statistic)}


def _kind_of(path: str) -> str:
    """The kind of a module, which names its shared projections: its last two names (frod/model.py)."""
    names = path.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    is_attention_output = names[-3:] == ["attention", "output", "dense"]
    return "attention_output" if is_attention_output else "_".join(names[-2:])
