"""How a model family is written as GGUF: its key/values, and where every tensor goes. One file per family.

    @architecture("LlamaForCausalLM", "MistralForCausalLM")
    def llama(model: HFModel) -> GGUFModelSpec: ...

A tensor whose rows llama.cpp wants in another order is described, not moved: a TensorTarget lists which stored row each
row of the GGUF tensor is. So tiles can be written in any order, and stacked experts are filled one expert at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mergeforge.core.registry import Registry
from mergeforge.errors import MALFORMED_ERRORS, SourceError, malformed_as_source_error
from mergeforge.gguf.key_values import Keys

if TYPE_CHECKING:
    import numpy as np

    from mergeforge.core.tensor_info import TensorInfo
    from mergeforge.gguf.architectures.model import HFModel
    from mergeforge.gguf.pooling import Pooling


@dataclass(frozen=True, eq=False)
class TensorTarget:
    """Where a stored tensor, or a part of it, goes in a GGUF file.

    The stored tensor is seen as rows x columns (TensorInfo.rows, .columns). GGUF row `first_row + j` is stored row
    `rows[j]` (`rows` None: all rows in order). `shape` is that of the whole GGUF tensor, slowest dimension first (as in
    numpy and HF; the file lists it in reverse); its rows are those of its last dimension. A 1-D tensor is one row;
    `first_row` then counts rows of the GGUF tensor. `first_column`: where a part of a 1-D GGUF tensor starts.

    `transpose` n: the selected rows, in groups of n, are matrices that are transposed: n rows x columns become
    columns x n. `columns` selects columns before that (`slice(0, None, 2)`: the even ones). `f32`: kept in F32 whatever
    the file's type.

    Column `j` of a row is stored column `column_order[j]`, which may leave columns out (None: all in order). Values are
    multiplied by each of `factors`, one after the other, then `add` is added; with `negative_exp`, x becomes -exp(x)
    (Mamba's A_log), with `softplus` log(1 + exp(x)); with `centered`, the mean of a 1-D tensor is subtracted.

    Columns can be selected only together with `transpose`. For every other column of a bias it is 1: each row becomes
    its selected elements, in order.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    first_column: int = 0
    rows: np.ndarray | None = None
    transpose: int = 0
    columns: slice | None = None
    column_order: np.ndarray | None = None
    factors: tuple[float, ...] = ()
    add: float = 0.0
    negative_exp: bool = False
    softplus: bool = False
    centered: bool = False
    f32: bool = False

    @property
    def first_element(self) -> int:
        """Where in the GGUF tensor the part starts, counted in elements."""
        return self.first_row * self.shape[-1] + self.first_column

    @property
    def keeps_rows(self) -> bool:
        """Whether every row of the GGUF tensor is a stored row, but for a constant that is added."""
        changed = self.factors or self.negative_exp or self.softplus or self.centered
        return not self.transpose and self.column_order is None and not changed


@dataclass(frozen=True)
class GGUFModelSpec:
    """A model as GGUF describes it.

    keys: in the converter's order, starting with the architecture's first key; `general.file_type` (value 0) is where
    the converter writes it, and absent for families without it. targets and dropped (name -> why) together cover every
    tensor of the checkpoint. constants: F32 tensors computed from the config (rope_freqs.weight), written first.
    vocab: the family's vocabulary type (see mergeforge.gguf.vocab). stacked_order: the order in which the converter
    writes the parts of a block's experts, if it is not that of their names. fixed_types: tensor -> its type in F16
    files and its type in others, for tensors that do not have the file's type.
    """

    arch: str
    keys: Keys
    targets: Mapping[str, tuple[TensorTarget, ...]]
    vocab: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stacked_order: tuple[str, ...] = ()
    fixed_types: Mapping[str, tuple[str, str]] = field(default_factory=dict)


# Models for several modalities whose class, not that of their text part, names the family.
_NAMED_BY_WHOLE = (
    "Exaone4_5_ForConditionalGeneration",
    "Sarashina2VisionForCausalLM",
    "Step3p7ForConditionalGeneration",
    "StepVLForConditionalGeneration",
)
_STEM = re.compile("(ForCausalLM|ForConditionalGeneration|LMHeadModel|Model)$")
BuildSpec = Callable[["HFModel"], GGUFModelSpec]
ARCHITECTURES: Registry[BuildSpec] = Registry("architecture", __name__)


def architecture(*names: str) -> Callable[[BuildSpec], BuildSpec]:
    """Register a function that builds the spec of the Hugging Face model classes `names`."""

    def register(function: BuildSpec) -> BuildSpec:
        for name in names:
            ARCHITECTURES.add(name, function)
        return function

    return register


def build_spec(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], pooling: Pooling | None = None
) -> GGUFModelSpec:
    """The GGUF spec of a model, from its config.json, its tensors, and the pooling of an embedder.

    Raises SourceError for an unknown model class, a missing key or tensor, a tensor that has no target, and weights
    that are already quantized.
    """
    from mergeforge.gguf.architectures.model import HFModel

    with malformed_as_source_error("config.json"):
        name = class_name(config)
    if name not in ARCHITECTURES:
        hint = (
            "`mergeforge list architectures` lists the supported ones; any model can be written as safetensors, and "
            "`converter: official`, in a recipe's output or as an option, lets llama.cpp's converter read it"
        )
        text = f"config.json: the architecture {name} is not supported in GGUF"
        raise SourceError(text, hint=f"{near} {hint}" if (near := _near_class(name)) else hint)
    try:
        return ARCHITECTURES[name](HFModel.of(name, config, tensors, pooling))
    except MALFORMED_ERRORS as error:  # a value of the wrong type
        text = f"config.json does not describe a {name}: {type(error).__name__}: {error}"
        raise SourceError(text, hint="compare it with the original model's config.json") from error


def _near_class(name: str) -> str:
    """A question that names the class which this one may be misspelled from; "" if none is near."""
    near = get_close_matches(_STEM.sub("", name), [_STEM.sub("", known) for known in ARCHITECTURES], 1, 0.8)
    same = [known for known in ARCHITECTURES if near and _STEM.sub("", known) == near[0]]
    return f"did you mean '{get_close_matches(name, same, 1, 0)[0]}'?" if same else ""


def class_name(config: Mapping[str, Any]) -> str:
    """The Hugging Face class of the text model, found as llama.cpp's converter does."""
    from mergeforge.gguf.architectures.hf_config import text_part

    outer = config.get("architectures")
    if outer and outer[0] in _NAMED_BY_WHOLE:
        return str(outer[0])
    names = (text_part(config) or {}).get("architectures") or outer
    if not names:
        raise SourceError("config.json has no 'architectures'", hint='add "architectures": ["LlamaForCausalLM"]')
    return str(names[0])
