"""Modules: to which part of a model a tensor belongs, told by its name.

The recipe's names are mergekit's (mergekit/_data/architectures: text_decoder, vision_tower,
multi_modal_projector, encoder, decoder, shared); a model's own names of its parts work too.
"""

from __future__ import annotations

from collections.abc import Iterable

# What a part is called in tensors' names, where that is not the module's own name.
_PARTS = {
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "vision_model": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "merger"),
    "audio_tower": ("audio_tower", "audio_encoder"),
}
# Parts that take what no other part's name is in, in this order.
_REST = ("default", "text_decoder", "decoder")


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """The module, of those given, that a tensor belongs to; None for none.

    Inner parts win: visual.merger is a merger.
    """
    modules = list(modules)
    pieces = name.split(".")
    depths = {module: _depth(module, pieces) for module in modules}
    best = max(depths, key=lambda module: depths[module])
    if depths[best] >= 0:
        return best
    others = {part for named in _PARTS.values() for part in named}
    if others & set(pieces) or ("encoder" in pieces and "decoder" in modules):
        return None  # a part that the recipe does not name
    return next((module for module in _REST if module in modules), None)


def _depth(module: str, pieces: list[str]) -> int:
    """The last piece of a name that is the module's; -1: none."""
    wanted = _PARTS.get(module, (module,))
    return max((at for at, piece in enumerate(pieces) if piece in wanted), default=-1)
