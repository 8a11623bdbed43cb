"""A PEFT adapter folder, ready to fold: its kind and configuration are checked, its tensors matched to the base."""

from __future__ import annotations

from pathlib import Path

from mergeforge.adapters.kinds import KINDS
from mergeforge.adapters.lora import plain_settings, read_settings
from mergeforge.adapters.refused import REFUSED
from mergeforge.errors import SourceError
from mergeforge.sources.checkpoint import Model, open_checkpoint, read_json
from mergeforge.sources.matching import Adapter, Matching

__all__ = ["Adapter", "open_adapter"]


def open_adapter(
    folder: Path, label: str, base: Model, *, revision: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Read an adapter's headers and match every tensor to the base.

    Raises SourceError when its kind or configuration cannot be folded, or a tensor matches nothing.
    """
    config = read_json(folder / "adapter_config.json")
    name = str(config.get("peft_type", "")).upper()
    if name in REFUSED:
        raise SourceError(f"{label}: {name} adapters cannot be merged here: {REFUSED[name]}")
    if name != "LORA" and name not in KINDS:
        hint = "known: LORA, " + ", ".join(KINDS)
        raise SourceError(f"{label}: adapters of type {name or 'unknown'} cannot be merged by this version", hint=hint)
    kind = None if name == "LORA" else KINDS[name]
    try:
        if kind:
            kind.check(config)
        settings = plain_settings(config) if kind else read_settings(config)
    except ValueError as error:
        raise SourceError(f"{label}: {error}") from None
    table = open_checkpoint(folder, label, revision=revision, allow_pickle=allow_pickle, stem="adapter_model")
    return Matching(label, base, table, settings, kind, config).adapter(folder, revision)
