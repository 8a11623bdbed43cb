"""What transformers says about its model classes: hf_classes.json, written by tools/hf_classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.names import class_names


@dataclass(frozen=True)
class ClassifierClass:
    """A model class with a classification head. head: the weight with a row for each label. names: its tensors outside
    the layers."""

    name: str
    head: str
    names: tuple[str, ...]


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("hf_classes.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def class_entry(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the table says about the ties of a model's class: {} if it has none, None if it is not in the table.

    A config that names no class is that of the class with a language model's head.
    """
    table = _table()
    names = class_names(config)
    name = names[0] if names else table["types"].get(str(config.get("model_type")), "")
    return table["entries"][table["of"][name]] if name in table["of"] else None


def classifier_class(task_type: str, model_type: str) -> ClassifierClass | None:
    """The class of a model type for a task of PEFT, such as SEQ_CLS."""
    entry = _table()["classifiers"].get(task_type, {}).get(model_type)
    return ClassifierClass(entry[0], entry[1], tuple(entry[2])) if entry else None


def class_with_prefix(model_type: str, prefix: str) -> str:
    """The class with a classification head whose tensors have this prefix (`transformer.`); "" if there is none."""
    entries = (task.get(model_type) for task in _table()["classifiers"].values())
    return next((entry[0] for entry in entries if entry and any(name.startswith(prefix) for name in entry[2])), "")
