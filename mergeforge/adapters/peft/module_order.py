"""The modules of a model's class in the order in which it defines them, where an adapter's file counts on that order.

Checkpoints do not tell this order, so transformers builds the model without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch.nn import Module

# What PEFT calls a task -> the class of transformers that loads a model for it, where that is another than the base's.
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_REASON = "its tensors are numbered in the order of the model's modules, and "


def module_order(config: Mapping[str, Any], adapter: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The modules in the order of the class that was trained. Raises ValueError where that is unknown.

    `config`: the base's config.json. `adapter`: the adapter_config.json.
    """
    model = _without_weights(config, adapter)
    places = {path: at for at, (path, _) in enumerate(model.named_modules())}
    if unknown := [module for module in modules if module not in places]:
        raise ValueError(f"{_REASON}{type(model).__name__} has no {unknown[0]}")
    return sorted(modules, key=lambda module: places[module])


def targeted_modules(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """The modules that an adapter_config.json targets, in the order of the class that was trained.

    Raises ValueError where that is unknown, or where it targets a module that is not linear.
    """
    model = _without_weights(config, adapter)
    found = {path: module for path, module in model.named_modules() if path and is_targeted(path, adapter)}
    for path, module in found.items():
        if type(module).__name__ not in ("Linear", "Conv1D"):
            raise ValueError(f"its config targets {path}, which is a {type(module).__name__}, not a linear layer")
    if not found:
        raise ValueError(f"its target_modules match no module of {type(model).__name__}")
    return list(found)


def is_targeted(path: str, adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter changes this module (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    targets, excluded = adapter.get("target_modules"), adapter.get("exclude_modules")
    if excluded and _matches(path, excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in adapter.get("modules_to_save") or ()):
        return False
    if not targets or not _matches(path, targets):
        return False
    layers = adapter.get("layers_to_transform")
    if isinstance(targets, str) or path in targets or layers is None or layers == []:
        return True
    patterns = adapter.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    matches = [match for pattern in patterns if (match := re.match(pattern, path))]
    return bool(matches) and int(matches[0][1]) in ([layers] if isinstance(layers, int) else layers)


def _matches(path: str, names: Any) -> bool:
    """Whether a path is one of the names or ends with one; a text is a regular expression for the whole path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _without_weights(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> Module:
    """The model that the adapter was trained on, as far as its config tells, else that of the base's class."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError(f"{_REASON}transformers, which knows it, is not installed; install transformers") from None
    mapping = adapter.get("auto_mapping")
    trained = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    architecture = str(trained or (config.get("architectures") or [""])[0])
    model_class = getattr(transformers, architecture, None)
    auto_class = None if trained else _AUTO_CLASSES.get(str(adapter.get("task_type")))
    with torch.device("meta"):
        if auto_class and config.get("model_type") in transformers.CONFIG_MAPPING:
            own = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            return cast("Module", getattr(transformers, auto_class).from_config(own))
        if model_class is None:
            name = architecture or "for it (config.json names no architecture)"
            raise ValueError(f"{_REASON}transformers has no class {name}")
        return cast("Module", model_class(model_class.config_class.from_dict(dict(config))))
