"""The classification head that an adapter brings to a base without one, as task_type SEQ_CLS, TOKEN_CLS and others do.

The result is a model of another class: its config says which, and how many labels there are, and it has no tensors of
the old head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.adapters.open import Adapter
from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.hf_classes import ClassifierClass, classifier_class
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.recipe.parameter_values import layer_of


@dataclass(frozen=True)
class ClassificationHead:
    """A new head. class_name: the class of the result. left_out: tensors of the base that this class does not have."""

    class_name: str
    labels: int
    left_out: tuple[str, ...]

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config, for the new class and its labels."""
        names = [f"LABEL_{number}" for number in range(self.labels)]
        labels: dict[str, Any] = {"id2label": {str(number): name for number, name in enumerate(names)}}
        labels["label2id"] = {name: number for number, name in enumerate(names)}
        return {**base, "architectures": [self.class_name], "num_labels": self.labels, **labels}

    @property
    def note(self) -> str:
        left_out = f"; it has no {format_list(self.left_out)}" if self.left_out else ""
        return f"the result is a {self.class_name} with {self.labels} labels, whose head an adapter brings{left_out}"


def new_classification_head(
    config: Mapping[str, Any], adapters: Sequence[Adapter], tensors: Mapping[str, TensorInfo]
) -> ClassificationHead | None:
    """The head that one of the adapters brings; None if none does. `tensors`: those of the output.

    Raises SourceError if a tensor of the new class is in neither base nor adapter.
    """
    for adapter in adapters:
        wanted = classifier_class(adapter.task_type, str(config.get("model_type")))
        if wanted and _has_tensor(wanted.head, adapter.added):
            _check_complete(wanted, adapter, tensors)
            labels = next(saved.info.rows for name, saved in adapter.added.items() if find_tensor(wanted.head, [name]))
            outside = [name for name in tensors if layer_of(name) is None]
            left_out = tuple(name for name in outside if not _has_tensor(name, wanted.names))
            return ClassificationHead(wanted.name, labels, left_out)
    return None


def _has_tensor(name: str, names: Iterable[str]) -> bool:
    return bool(find_tensor(name, list(names)))


def _check_complete(wanted: ClassifierClass, adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in wanted.names if not _has_tensor(name, tensors)]
    if missing:
        text = f"{adapter.label} makes a {wanted.name}, whose {format_list(missing)} neither it nor the base has"
        hint = "it was trained on random values that were not saved; save them too, with modules_to_save"
        raise SourceError(text, hint=hint)
