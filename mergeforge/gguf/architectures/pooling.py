"""The pooling type of an embedder as a key, and what an engine does not pool as sentence-transformers does."""

from __future__ import annotations

from collections.abc import Iterator

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.key_values import Value, u32
from mergeforge.gguf.pooling import POOLING_TYPES

_ENGINE_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # of llama.cpp's option --pooling


def pooling_keys(model: HFModel) -> dict[str, Value]:
    """`pooling_type`, for families for which llama.cpp's converter writes it."""
    number = model.pooling.type if model.pooling else None
    return {} if number is None else {"pooling_type": u32(number)}


def pooling_notes(model: HFModel, *, writes_key: bool = True, embeds: bool = True) -> Iterator[str]:
    """What to set when the file is run, where it does not hold the pooling. `embeds`: the model can do nothing else."""
    pooling = model.pooling
    if pooling is None:
        if embeds:
            yield (
                "the file does not contain the pooling type, because the model has no modules.json: run it with "
                "--pooling mean, cls or last, as its card says"
            )
        return
    mode = pooling.modes[0] if pooling.modes else "none"
    if mode not in POOLING_TYPES:
        yield WarningText(f"llama.cpp has no pooling by {mode}: the GGUF file contains no pooling type")
    elif not writes_key:
        yield f"the file does not contain the pooling type: run it with --pooling {_ENGINE_NAMES[mode]}"
    if len(pooling.modes) > 1:
        yield WarningText(
            f"the model concatenates {len(pooling.modes)} poolings ({', '.join(pooling.modes)}), but llama.cpp has "
            "only the first: embeddings from the GGUF file differ"
        )
    if pooling.dense:
        yield WarningText(
            f"the GGUF file does not contain {', '.join(pooling.dense)}: its embeddings lack that projection"
        )
