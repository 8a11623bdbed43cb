"""How a sentence-transformers folder pools token embeddings: modules.json and the config.json of its Pooling module.

Read as llama.cpp's converter reads them (conversion/base.py, _try_set_pooling_type).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.errors import malformed_as_source_error

MODULES = "modules.json"
POOLING_TYPES = {"mean": 1, "cls": 2, "lasttoken": 3}  # llama.cpp's numbers; it also has none (0) and rank (4)
_FLAGS = {  # in the converter's order: the first one that is set decides
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Pooling:
    """The modules after the transformer.

    modes: the pooling modes that are on, as sentence-transformers names them; their results are concatenated.
    dense: the folders of Dense modules, which project the embedding.
    """

    modes: tuple[str, ...]
    dense: tuple[str, ...] = ()

    @property
    def type(self) -> int | None:
        """llama.cpp's number for the pooling, or None where it has none."""
        return POOLING_TYPES.get(self.modes[0]) if self.modes else None


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers folder; None for a folder without a Pooling module.

    Raises SourceError for files that are malformed.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    with malformed_as_source_error(path):
        modules = json.loads(path.read_text("utf-8"))
        kinds = [(str(module["type"]), str(module["path"])) for module in modules]
    dense = tuple(path for kind, path in kinds if kind.endswith("Dense"))
    config = next((folder / path / "config.json" for kind, path in kinds if kind.endswith("Pooling")), None)
    if config is None or not config.is_file():
        return None
    with malformed_as_source_error(config):
        return Pooling(_modes(json.loads(config.read_text("utf-8"))), dense)


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes that are on. Newer files name them in `pooling_mode`, older ones have a flag for each."""
    modes = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag))
    if modes:
        return modes
    named = config.get("pooling_mode")
    return tuple(map(str, named)) if isinstance(named, list) else (str(named),) if named else ()
