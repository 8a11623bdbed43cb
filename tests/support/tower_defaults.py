"""The defaults of transformers' config classes of towers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def transformers_defaults(kind: str, keys: Iterable[str]) -> dict[str, Any]:
    """The values of these keys in a config class of transformers that is made without arguments."""
    config = _config(kind)
    return {key: list(value) if isinstance(value := getattr(config, key), tuple) else value for key in keys}


def _config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    for name in CONFIG_MAPPING:
        try:
            known = CONFIG_MAPPING[name]
        except (KeyError, ImportError, ValueError):
            continue
        for part in [known, *(known.sub_configs or {}).values()]:
            if getattr(part, "model_type", "") == kind:
                return part()
    raise LookupError(kind)
