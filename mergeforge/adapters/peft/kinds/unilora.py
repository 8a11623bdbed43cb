"""Uni-LoRA: the entries of all factors are those of one vector, scaled (https://arxiv.org/abs/2506.00799)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter, low_rank

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_FIELDS = "r proj_seed theta_d_length unilora_dropout fan_in_fan_out bias init_theta_d_bound save_indices"
_LOCK = Lock()


@adapter("UNILORA", prefixes=("unilora_",), fields=_FIELDS)
def unilora(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + B A with A = theta[indices] * scales, and B likewise (peft/tuners/unilora/layer.py).

    A file without the indices is read as PEFT reads it: they are dealt out again, to all modules in their order.
    """
    (length,) = module.require("unilora_theta_d", None)
    if "unilora_indices_A" not in module.shapes:
        return {"weight": _with_dealt_indices(config, module, length)}
    rank = module.require("unilora_indices_A", None, module.in_features)[0]
    module.require("unilora_indices_B", module.out_features, rank)
    for side in "AB":
        module.require(f"unilora_scales_{side}", *module.shapes[f"unilora_indices_{side}"])

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        a, b = (
            factors["unilora_theta_d"][factors[f"unilora_indices_{side}"].long()] * factors[f"unilora_scales_{side}"]
            for side in "AB"
        )
        return low_rank(b, a)

    return {
        "weight": Formula("Uni-LoRA", prepare, scratch_nbytes=16 * rank * (module.out_features + module.in_features))
    }


def _with_dealt_indices(config: Config, module: AdaptedModule, length: int) -> Formula:
    """The formula of a module whose indices are not in the file.

    A scale is 1 / sqrt(count of the index in all modules), in the dtype of the weight, as PEFT holds it.
    """
    rank, seed = int(config.get("r", 4)), int(config.get("proj_seed", 42))
    if length != config.get("theta_d_length", 256):
        raise ValueError(f"unilora_theta_d has {length} values, but its config sets theta_d_length otherwise")
    index, weights = module.order()
    ends = [0, *accumulate(rank * (shape[0] + int(np.prod(shape[1:]))) for shape in weights)]
    dtype = module.dtype

    def prepare(factors: Mapping[str, Tensor]) -> Delta:
        import torch

        indices, counts = _dealt_indices(ends[-1], length, seed)
        own = torch.from_numpy(indices[ends[index] : ends[index + 1]]).long()
        scales = torch.from_numpy(counts).float().rsqrt()
        rounded = scales.to({"BF16": torch.bfloat16, "F16": torch.float16}.get(dtype, torch.float32))
        theta = factors["unilora_theta_d"]
        values = theta[own.to(theta.device)] * rounded.to(theta)[own.to(theta.device)]
        a, b = values[: rank * module.in_features], values[rank * module.in_features :]
        return low_rank(b.view(module.out_features, rank), a.view(rank, module.in_features))

    own_nbytes = 24 * rank * (module.out_features + module.in_features)
    return Formula("Uni-LoRA", prepare, scratch_nbytes=own_nbytes + 4 * ends[-1] + 16 * length)


def _dealt_indices(total: int, length: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The indices of all entries of all factors, and how often each occurs (peft/tuners/unilora/model.py)."""
    with _LOCK:
        return _deal_indices(total, length, seed)


@lru_cache(maxsize=1)
def _deal_indices(total: int, length: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    generator = np.random.default_rng(seed)
    each, extra = divmod(total, length)
    indices = np.empty(total, dtype=np.int32)
    indices[: each * length].reshape(length, each)[:] = np.arange(length, dtype=np.int32)[:, None]
    counts = np.full(length, each, dtype=np.int64)
    if extra:
        indices[each * length :] = extras = generator.choice(length, size=extra, replace=False)
        counts[extras] += 1
    generator.shuffle(indices)
    return indices, counts
