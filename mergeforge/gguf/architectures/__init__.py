"""How GGUF spells a model family: its key/values, and where every tensor goes. One file a family.

    @architecture("LlamaForCausalLM", "MistralForCausalLM")
    def llama(model: Model) -> Spelling: ...

A tensor that llama.cpp wants in another order of rows is described, not moved: a *place* lists, for
the rows of a GGUF tensor, which rows of the stored tensor they are. So the merge can carry any rows
in any order and knows where each goes, and a stack of experts is filled one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.core.registry import Registry
from mergeforge.errors import MALFORMED_ERRORS, SourceError, did_you_mean, malformed_as_source_error
from mergeforge.gguf.key_values import Keys

if TYPE_CHECKING:
    import numpy as np

    from mergeforge.core.tensor_info import TensorInfo
    from mergeforge.gguf.architectures.model import HFModel


@dataclass(frozen=True, eq=False)
class TensorTarget:
    """Where a stored tensor, or a part of it, goes in a GGUF file.

    The stored tensor is seen as rows x columns (TensorInfo.rows, .columns). GGUF row `first + j` is
    stored row `rows[j]` (`rows` None: all rows in order). `shape` is the whole GGUF tensor's, slowest
    dimension first (as numpy and HF say it; the file lists it the other way round); its rows are those
    of its last dimension. A 1-D tensor is one row; `first` then counts rows of the GGUF tensor.

    `turn` n: the chosen rows, in groups of n, are matrices that are transposed: n rows x columns become
    columns x n. `columns` then chooses columns before that (`slice(0, None, 2)`: the even ones). `add`
    is added to every value. `f32`: kept in F32 whatever the file's type.

    Columns are chosen in a matrix only while it is turned; every other column of the plain rows of a
    bias is turned by 1: each row becomes its chosen elements, in order.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    rows: np.ndarray | None = None
    transpose: int = 0
    columns: slice | None = None
    add: float = 0.0
    f32: bool = False


@dataclass(frozen=True)
class GGUFModelSpec:
    """A model as GGUF spells it.

    `keys`: in the converter's order, from the architecture's first key on; `general.file_type`
    stands in it (value 0) where the converter writes it, and nowhere for families that have none.
    `places` and `dropped` (name -> why) together hold every tensor of the checkpoint. `constants`: F32
    tensors that come from the config (rope_freqs.weight), written first. `vocab`: which vocabulary the
    family has (see mergeforge.gguf.vocab).
    """

    arch: str
    keys: Keys
    targets: Mapping[str, tuple[TensorTarget, ...]]
    vocab: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


BuildSpec = Callable[["HFModel"], GGUFModelSpec]
ARCHITECTURES: Registry[BuildSpec] = Registry("architecture", __name__)


def architecture(*names: str) -> Callable[[BuildSpec], BuildSpec]:
    """Register a function as the spelling of the Hugging Face model classes `names`."""

    def register(family: BuildSpec) -> BuildSpec:
        for name in names:
            ARCHITECTURES.add(name, family)
        return family

    return register


def build_spec(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> GGUFModelSpec:
    """How GGUF spells the model of a config.json and its tensors.

    Raises SourceError for a model class that is not known, a key or tensor that is missing, a tensor
    that has no place, and weights that are quantised already.
    """
    from mergeforge.gguf.architectures.model import HFModel

    with malformed_as_source_error("config.json"):
        name = class_name(config)
    if name not in ARCHITECTURES:
        near = did_you_mean(name, ARCHITECTURES)
        hint = f"{near} " if near else ""
        raise SourceError(
            f"config.json: GGUF output does not know the architecture {name}",
            hint=f"{hint}`mergeforge list architectures` prints what is known; any model can be written as safetensors",
        )
    try:
        return ARCHITECTURES[name](HFModel.of(name, config, tensors))
    except MALFORMED_ERRORS as error:  # a value of another kind than its key's
        text = f"config.json does not describe a {name}: {type(error).__name__}: {error}"
        raise SourceError(text, hint="compare it with the config.json of the model's makers") from error


def class_name(config: Mapping[str, Any]) -> str:
    """The Hugging Face class of the text model, as the converter finds it."""
    text = config.get("text_config")
    inner = text.get("architectures") if isinstance(text, Mapping) else None
    names = inner or config.get("architectures")
    if not names:
        raise SourceError("config.json has no 'architectures'", hint='add "architectures": ["LlamaForCausalLM"]')
    return str(names[0])
