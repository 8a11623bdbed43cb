"""Models that tie tensors, merged with models that store these under other names, or under more of them."""

from __future__ import annotations

from collections.abc import Mapping

from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.tensors.lazy import LazyTensor


def with_same_names(models: Mapping[str, ModelTensors]) -> Mapping[str, ModelTensors]:
    """The models with tied tensors under all names, where they do not all store the same of these."""
    tied = {name for model in models.values() for tie in model.ties for name in tie.names}
    if len({frozenset(tied & model.tensors.keys()) for model in models.values()}) <= 1:
        return models
    return {label: model.with_all_names() for label, model in models.items()}


def splits_a_tie(model: ModelTensors, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the output has a tied tensor under a name that the model does not store."""
    return any(name in tensors and name not in tie.stored for tie in model.ties for name in tie.names)
